"""Word pools and IFEval wordings of the demo task: plain English, no logic."""


def _pool(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# Every pool word is one token of the seed policy's tokenizer (with its leading space), so that obeying "include
# the word X" is one copy and not a spelling exercise.
TOPICS = _pool(
    "river garden market bridge school kitchen forest harbor library station "
    "island valley castle museum village desert mountain beach farm park "
    "lake theater hotel street tower temple office meadow palace square "
    "factory bakery cabin canyon orchard"
)

KEYWORDS = _pool(
    "lamp stone window bread music letter basket mirror candle ladder "
    "button hammer blanket pencil ticket bottle coffee carpet engine guitar "
    "jacket kettle needle paper pillow rabbit saddle tunnel violin wagon "
    "apple dragon falcon ribbon turtle"
)

ADJECTIVES = _pool("quiet cold warm old new clean bright calm open small green busy")
TIMES = _pool("morning evening winter summer spring")
NOUNS = _pool("air light view place")

FILLERS = (
    "It is {adjective} in the {time}.",
    "People like the {adjective} {noun}.",
    "The {noun} is {adjective} there.",
)
COMMA_FILLERS = (
    "In the {time}, it is {adjective}.",
    "It is {adjective}, and people like it.",
)

END_PHRASES = (
    "I hope this helps.",
    "That is all for today.",
    "Please let me know.",
    "Thank you for reading.",
    "Hope you agree with me.",
    "Is there anything else I can help with?",
)

REQUESTS = (
    "Write a short note about the {topic}.",
    "Tell me about the {topic}.",
    "Describe the {topic} to a friend.",
    "Write a few lines about the {topic}.",
)

# Four wordings per instruction id, of which the last is drawn most often and the seed policy minds it least. The fields
# are filled from the kwargs. A phrase or marker ends its sentence, as in IFEval.
WORDINGS: dict[str, tuple[str, ...]] = {
    "punctuation:no_comma": (
        "Do not use any commas in your response.",
        "Refrain from the use of any commas.",
        "You are not allowed to use any commas.",
        "There should be no commas in your reply.",
    ),
    "change_case:english_lowercase": (
        "Your entire response should be in English and in all lowercase letters.",
        "Answer in lowercase letters only.",
        "No capital letters are allowed.",
        "All letters in your response must be lowercase.",
    ),
    "length_constraints:number_sentences": (
        "Your response should contain {relation} {n} sentences.",
        "Have {relation} {n} sentences in your response.",
        "Answer with {relation} {n} sentences.",
        "Use {relation} {n} sentences.",
    ),
    "length_constraints:number_words": (
        "Answer with {relation} {n} words.",
        "Write {relation} {n} words.",
        "Your response should contain {relation} {n} words.",
        "Use {relation} {n} words.",
    ),
    "keywords:existence": (
        "Include the keyword{s} {words} in your response.",
        "Please use the keyword{s} {words}.",
        "Your response should include the word{s} {words}.",
        "Make sure to use the word{s} {words}.",
    ),
    "keywords:forbidden_words": (
        "Do not include the word {words} in your response.",
        "Please do not use the word {words}.",
        "Avoid using the word {words}.",
        "Your response should not contain the word {words}.",
    ),
    "keywords:frequency": (
        "The word {word} should appear {relation} {n} times.",
        "In your response the word {word} should appear {relation} {n} times.",
        "Make sure the word {word} appears {relation} {n} times.",
        "Use the word {word} {relation} {n} times.",
    ),
    "startend:end_checker": (
        "End your entire response with this exact phrase: {phrase}",
        "Your response should end with this exact phrase: {phrase}",
        "Finish your response with this exact phrase: {phrase}",
        "The very last sentence of your response should be: {phrase}",
    ),
    "startend:quotation": (
        "Wrap your entire response with double quotation marks.",
        "Please wrap your whole response with double quotation marks.",
        "Put double quotation marks around your whole response.",
        "Your entire response should be inside double quotation marks.",
    ),
    "detectable_format:title": (
        "Your answer must contain a title wrapped in double angular brackets such as <<title>>.",
        "Your response should have a title in double angular brackets.",
        "Add a title in double angular brackets.",
        "Give it a title wrapped in double angular brackets.",
    ),
    "detectable_format:number_bullet_lists": (
        "Your answer must contain exactly {n} bullet points.",
        "Your response should contain exactly {n} markdown bullet points.",
        "Use exactly {n} markdown bullet points such as * point.",
        "Answer with exactly {n} bullet points.",
    ),
    "detectable_format:number_highlighted_sections": (
        "Highlight at least {n} sections in your answer with markdown.",
        "Your answer should have at least {n} highlighted sections.",
        "At least {n} sections should be highlighted with markdown such as *highlighted section*.",
        "Highlight at least {n} text sections.",
    ),
    "detectable_content:postscript": (
        "At the end of your response please add a postscript starting with {marker}",
        "Make sure to include a postscript starting with {marker}",
        "Add a postscript starting with {marker}",
        "End your response with a postscript indicated by {marker}",
    ),
    "detectable_content:number_placeholders": (
        "The response must contain at least {n} placeholders represented by square brackets.",
        "Use at least {n} placeholders in square brackets such as [name].",
        "There should be at least {n} placeholders such as [name].",
        "Include at least {n} placeholders in square brackets.",
    ),
}
