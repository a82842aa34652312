"""A small English tagger in the layout of NLTK's `averaged_perceptron_tagger_eng`.

NLTK's own data can only be downloaded. Whether a check asks the tagger as the official code does shows with any model,
so NLTK's trainer makes this one from sentences of our own; the golden rows of words:start_verb are labelled by it.
"""

from __future__ import annotations

import atexit
import functools
import json
import random
import shutil
import tempfile
from pathlib import Path

NAME = "averaged_perceptron_tagger_eng"

# The tag stands behind the word; NN where none does.
TAGGED = """
Write/VB a/DT poem about/IN the/DT sea ./.
Write/VB two/CD letters/NNS and/CC send/VB them/PRP ./.
Read/VB the/DT letter before/IN you/PRP answer/VBP ./.
Take/VB the/DT road to/TO the/DT harbour and/CC turn/VB left/RB ./.
Turn/VB the/DT lamp off/RP ,/, then/RB close/VB the/DT door ./.
Run/VB !/.
Run/VB home/RB now/RB ,/, said/VBD the/DT smith/NN ./.
Consider/VB this/DT :/: nothing is/VBZ free/JJ ./.
Mix/VB flour and/CC water until/IN the/DT dough holds/VBZ ./.
Go/VB on/RP ,/, she/PRP said/VBD ./.
Running/VBG is/VBZ good/JJ for/IN you/PRP ./.
Walking/VBG along/IN the/DT river ,/, we/PRP saw/VBD a/DT heron ./.
Built/VBN in/IN 1890/CD ,/, the/DT bridge still/RB stands/VBZ ./.
Painted/VBN doors/NNS look/VBP new/JJ ./.
Is/VBZ it/PRP far/RB ?/.
Are/VBP you/PRP the/DT smith ?/.
Do/VBP n't/RB wait/VB for/IN me/PRP ./.
Does/VBZ the/DT boat leave/VB today ?/.
Have/VBP you/PRP seen/VBN my/PRP$ hat ?/.
Can/MD you/PRP swim/VB ?/.
The/DT boat leaves/VBZ at/IN noon ./.
The/DT run was/VBD long/JJ ./.
The/DT two/CD old/JJ boats/NNS left/VBD early/RB ./.
A/DT letter came/VBD today ./.
An/DT owl sat/VBD on/IN the/DT roof ./.
I/PRP write/VBP letters/NNS every/DT day ./.
I/PRP 'm/VBP sure/JJ the/DT walk is/VBZ short/JJ ./.
We/PRP walk/VBP home/RB when/WRB it/PRP rains/VBZ ./.
She/PRP runs/VBZ and/CC he/PRP walks/VBZ ./.
They/PRP turn/VBP left/RB at/IN the/DT mill ./.
It/PRP 's/VBZ a/DT good/JJ read ./.
My/PRP$ walk to/TO the/DT mill takes/VBZ an/DT hour ./.
This/DT answer is/VBZ wrong/JJ ./.
Letters/NNS from/IN home came/VBD late/RB ./.
Boats/NNS need/VBP paint ./.
Water boils/VBZ at/IN 100/CD degrees/NNS ./.
Maria/NNP writes/VBZ to/TO Tom/NNP ./.
Tom/NNP answers/VBZ ./.
Mill/NN and/CC river belong/VBP together/RB ./.
Answer/NN :/: no/DT ./.
Left/JJ hands/NNS are/VBP rare/JJ ./.
However/RB ,/, the/DT mill closed/VBD ./.
Perhaps/RB it/PRP rains/VBZ ./.
Slowly/RB turn/VB the/DT wheel ./.
If/IN it/PRP rains/VBZ ,/, stay/VB home/RB ./.
And/CC then/RB run/VB ./.
12/CD boats/NNS left/VBD ./.
*/SYM Write/VB soon/RB
-/: Walk/VB on/RP
``/`` Stay/VB ,/, ''/'' she/PRP said/VBD ./.
well-made/JJ shoes/NNS last/VBP ./.
"""
_ROUNDS = 7  # so that NLTK's dictionary of words with one tag (20 times or more) has some


@functools.lru_cache(maxsize=1)
def tagger_folder() -> Path:
    """A folder of NLTK data that holds this tagger, made once a process and removed at its end."""
    from nltk.tag.perceptron import PerceptronTagger

    sentences = [
        [(word, tag or "NN") for word, _, tag in (piece.partition("/") for piece in line.split())]
        for line in TAGGED.strip().split("\n")
    ]
    tagger = PerceptronTagger(load=False)
    before = random.getstate()
    random.seed(0)  # the trainer shuffles
    try:
        tagger.train(sentences * _ROUNDS)
    finally:
        random.setstate(before)
    root = Path(tempfile.mkdtemp(prefix="tagger-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    folder = root / "taggers" / NAME
    folder.mkdir(parents=True)
    parts = {"weights": tagger.model.weights, "tagdict": tagger.tagdict, "classes": sorted(tagger.classes)}
    for part, content in parts.items():
        (folder / f"{NAME}.{part}.json").write_text(json.dumps(content), encoding="utf-8")
    return root
