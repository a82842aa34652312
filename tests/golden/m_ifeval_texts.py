"""Japanese, Spanish and French texts of this project's own, for the cases of m_ifeval.py."""

import ifeval

SENTENCES = {
    "ja": (
        "古い灯台は岬の先に立っている。",
        "なぜ猫は雨の日に眠るのでしょうか？",
        "駅前のカフェで友達と音楽の話をしました。",
        "自転車で海まで走ると、風が気持ちいい！",
        "「夢の話をしよう。」と祖母は言った。",
        "新しい技術（じゅつ。）が町を変えた。",
        "りんごを3つと、みかんを12個ください。",
        "彼の夢は大聖堂を見ることです。",
        "アプリのデザインは、とても使いやすいです。",
        "静かな図書館、深い森、遠い雷。",
        "『星の本』を読みました。",
        "ABC社のコストは20%下がります",
        "すもももももももものうち。",
        "昨日から雨雲が出ていて、雨音だけが響く夜",
        "さあ、行こう!",
        "待って…",
    ),
    "es": (
        "El faro viejo duerme junto al mar.",
        "¿Por qué la cigüeña no vuelve en otoño?",
        "La Sra. Núñez compró pan, queso y 3 kg de uvas.",
        "¡Qué vergüenza, señor alcalde!",
        "Según el Dr. Ibáñez, EE. UU. y la O.N.U. firmarán mañana.",
        "Llegamos a las 10 a.m. o a las 5p.m., creo.",
        "El niño pequeño soñó con una montaña de azúcar.",
        'Dijo: "No me esperes", y cerró la puerta.',
        "Escribe a ana.gil@correo.es o visita www.puerto.es/mapa?x=1.",
        "El pingüino ganó 1.250,50€ (¡y un pan de 2kg!).",
        "Hacía 25 °C a la sombra; nadie hablaba...",
        "Un tren, dos vías, tres túneles: así empieza el viaje.",
        "EL ALCALDE NO VINO, pero su perro sí.",
        "Ni tú ni yo — ni nadie — lo sabía.",
        "Después, silencio.",
        "Vuelve pronto :)",
    ),
    "fr": (
        "Le vieux phare dort au bord de la mer.",
        "M. Leroy et Mme. Petit arrivent à 8 h 30 env. avec le Dr. Blanc.",
        "Pourquoi la cigogne ne revient-elle pas ?",
        "L'été, on mange des pêches, des prunes, etc. Puis on dort.",
        "Il a dit : « Reviens demain. » Elle a souri.",
        "Le train de 17 h part vers av. Foch ; dépêche-toi !",
        "Né en janv. 1950, il vécut aux E.-U. Et toi ?",
        "Ça coûte 3.14 euros, cf. p. 12 du vol. 2.",
        "Un œuf, deux œufs, et le cœur léger...",
        "Nul ne sait où mène ce chemin c.-à-d. personne.",
        "Voir https://port.fr/plan.html pour la suite.",
        "LA MAIRIE EST FERMÉE, dit le gardien.",
        "Tél. : 01 23 45 67 89. Appelle vite.",
        "Quelle joie !",
        "Enfin, le silence.",
        "Peut-être qu'aujourd'hui il n'y a pas d'école...",
    ),
}
# What the English sentences of IFEval's cases become.
INSTEAD = {language: dict(zip(ifeval.SENTENCES, own, strict=True)) for language, own in SENTENCES.items()}
LONG = {
    "es": "Nadie recordaba quién había construido el puente, pero todos lo cruzaban cada día para ir al mercado.",
    "fr": "Personne ne savait plus qui avait construit le pont, mais chacun le traversait pour aller au marché.",
}
JA_WORDS = (
    "夢", "音", "雨", "猫", "海", "本", "技術", "カフェ", "アプリ", "大聖堂", "自転車", "友達", "デザイン", "もも",
    "ABC", "です", "雨音", "伝説のコーチ", "図書館", "。", "き", "20",
)  # fmt: skip
# Where ja_sentence_segmenter's readings part ways: quotes, parentheses, marks, a の at the end of a line.
JA_BREAKS = (
    "本の", "の", " の", "\u3000の", "のの", "あ。い。", "「あ。い。」", "「あ。", "」", "（あ！い？）", "(あ！",
    ")", "｢あ｡い｡｣", "「（あ。」い。）", "∯", "。∯", "∯。い", "。。", "!?", "？！", "｡", "あ ", "\u2028", "\x0b",
    "\x85", "。 ", "ノ", "『あ。い。』", "1.5", "あ、", "\u200b", "ﾉ。", "e.g.",
)  # fmt: skip
ES_PIECES = (
    " EE. UU. ", " EE.UU. ", " Sr. Gil ", " p.ej. ", " etc. ", " 12m. ", " 5pm ", " xD ", " :-) ", " (: ) ",
    " : ) ", " <3 ", "...", "……", "—", "–", " - ", " -- ", " pal ", " http://a.es/b ", " a@b.es ", " a.b ", " A.B ",
    " a,b ", " 5km ", " 3€. ", " US$5 ", " +34 ", "+", "'", "''", "“", "”", "«", "»", "\t", "\u00a0", "\u2003",
    " \n ", "😀", "👍🏽", "①", "°C", " 20 °C. ", " ü. ", " Ñ. ", "\x00", "\u0301", "\ufeff", "·", " km/h ", " a:b ",
    " 1/2 ", "_", " ¯\\(ツ)/¯ ", "(¡no!)", "?!", " 0.0 ",
)  # fmt: skip
ES_SPACES = (
    " ", " ", " ", " ", " ", "  ", "\n", "\n\n", "\n- ", "\n2. ", " \n", "\n* ", "\n 3.\n", "\r\n", "\t", "-", ". ",
)  # fmt: skip
ES_CAPITALS = (
    "NO", "A", "S.A.", "S.A", "EE. UU.", "O.N.U.", "SÍ,", "¡YA!", "OK-OK", "A/B", "X.Y", "ADN:ARN", "3D", ":D",
    "XD", "D:", "P.D.", "Dr.", "1A.M.", "É", "Ñ.", "A,B", "IV", "(UE)", "«ONU»", "WWW.A.ES", "A…B", "Ⅷ", "no",
)  # fmt: skip
ES_ACCENTED = (
    "está", "ÁRBOL", "y", "así.", "qué?", "e\u0301l", "tú,él", "mamá-papá", "sofá/café", "pág.", "Cía.", "núm.3",
    "à", "ü", "ó", "él.Él", "¡Ay!", "día…noche", "www.í.es", "_á_", "á😀é",
)  # fmt: skip
ES_ENIE = (
    "año", "NIÑO", "y", "n\u0303o", "ñ", "Ñu.", "año/caña", "mañana-año", "ñ.Ñ", "piña,uña", "ñ…ñ", "(ñ)", "ã", "n",
    "e.ñ@ñ.es", "ñ😀ñ", "ñ:ñ",
)  # fmt: skip
ES_DIERESIS = (
    "agüero", "PINGÜINO", "y", "u\u0308", "ü", "ü.", "Ü.", "güe/güi", "ü-ü", "ü.Ü", "ü,ü", "ü…ü", "(ü)", "ù", "ö.",
    "x@ü.es", "ü=ü",
)  # fmt: skip
FR_ACCENTS = (
    ("lecon", "leçon"), ("ecole", "école"), ("a", "à"), ("ete", "été"), ("tot", "tôt"), ("coeur", "cœur"),
    ("ou", "où"), ("phare", "phare"), ("mais", "maïs"), ("vieux", "vieux"), ("strasse", "straße"), ("la", "là"),
)  # fmt: skip
