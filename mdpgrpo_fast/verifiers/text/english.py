"""A small English model for `punkt.Splitter`, written for this project: used where NLTK's data are not installed."""

from .punkt import Tables

_ABBREVIATIONS = """
mr mrs ms dr prof rev hon gov sen rep pres gen col maj capt lt cmdr sgt cpl st messrs mme mlle supt
inc ltd co corp bros assn dept est div univ mfg intl
jan feb mar apr jun jul aug sep sept oct nov dec mon tue tues wed thu thurs fri
a.m p.m a.d b.c b.c.e c.e e.g i.e u.s u.k u.n u.s.a e.u d.c n.y l.a ph.d m.d b.a m.a b.s d.d.s r.n
ave blvd rd mt ft sq approx est vs v cf fig figs vol ed eds pp op cit al ca esp
min max tel ext misc oz lb lbs hr hrs mi km cm mm
ala ariz ark calif colo conn del fla ga ill ind kan ky la md mass mich minn miss mo mont neb nev okla ore pa penn
tenn tex va vt wash wis wyo ont que
"""

# Words that begin with a capital only because they begin a sentence.
_COMMON = """
a about after again all also although always an and another any are as at be because been before being between both
but by can could despite did do does during each either even every few first for from get had has have having he her
here his how however i if in instead into is it its just last later let like make many may maybe meanwhile more
moreover most much my need never next no nor not nothing now of often on once one only or other our out over overall
perhaps please since so some sometimes soon still such take than that the their them then there therefore these they
this those though through thus to today together too two under unless until up use very was we well were what whatever
when whenever where whether which while who whoever why will with within without would yes yet you your
"""

_BEGIN_UPPER_MID_LOWER = 1 << 1 | 1 << 5

TABLES = Tables(
    abbreviations=frozenset(_ABBREVIATIONS.split()),
    starters=frozenset("he she it they we i this that these those there however but in the".split()),
    met=dict.fromkeys(_COMMON.split(), _BEGIN_UPPER_MID_LOWER),
)
