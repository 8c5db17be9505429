"""What names a patient in an English report, as patterns: names, dates, numbers, addresses, paths.

A pattern finds what is written in a usual form. What has no form (a bare surname, a nickname, a village) is left
to the words seen with few patients (`scrubbing.rare_words`), and neither finds everything.
Every repetition but a pattern's last is bounded, so that a hostile text takes no more than linear time.
"""

import re

from mnemos.sharding.building.scrubbing import MARK

_MOST_ROUNDS = 10  # a text of people takes two: one that changes and one that does not

_LETTER = r"[^\W\d_]"
_REST = rf"(?:['’-]?{_LETTER}){{0,30}}+\b"
# Words that follow a title or a cue, or stand before a degree, and are no name.
_NO_NAME = (
    "a|all|an|and|any|are|as|at|be|been|before|but|by|called|can|did|discussed|do|does|during|each|for|from|"
    "had|has|have|he|her|here|his|i|if|in|into|is|it|its|may|new|no|none|not|notified|now|of|on|or|our|"
    "per|please|pt|recommended|recommends|requested|reviewed|said|seen|she|should|stated|that|the|their|"
    "then|there|these|they|this|to|today|told|unknown|was|we|were|when|which|who|will|with|within|"
    "without|abdomen|acute|addendum|age|anonymous|bilateral|brain|chest|clear|clinical|comfortable|"
    "comparison|conclusion|contrast|correlation|ct|date|dob|dr|exam|examination|female|fellow|final|"
    "findings|fluoro|follow|head|heart|history|id|image|images|impression|indication|intubated|left|"
    "lesion|lesions|lung|lungs|male|medical|mild|moderate|mr|mri|ms|negative|normal|note|page|patient|"
    "pelvis|physician|portable|positive|positioned|procedure|prone|prior|radiograph|radiologist|"
    "radiology|report|resident|right|rotated|severe|sex|signed|spine|stable|staff|study|supine|surgery|"
    "team|technique|time|upright|xr"
)
_NAME = rf"(?!(?i:{_NO_NAME})\b)"
_PROPER = rf"(?:[^\W\d_a-z]\.|{_NAME}[^\W\d_a-z]{_REST}(?!\s?:))"  # an initial, or a word with a capital
_PLAIN = rf"(?:{_NAME}{_LETTER}{_REST}(?!\s?:))"
_CAPITAL = r"(?<!\w)(?=[^\W\d_a-z])"  # a quick look, where a pattern begins with a name
_OF = r"(?:(?i:van|von|der|den|de|del|della|di|da|dos|la|le|el|al|bin|ibn|st\.)\s)"
_FULL = rf"{_OF}{{0,2}}{_PROPER}(?:\s{_OF}{{0,2}}{_PROPER}){{0,2}}"
_LISTED = rf"{_OF}{{0,2}}{_PROPER}(?:,?\s{_OF}{{0,2}}{_PROPER}){{0,3}}"  # also "Surname, Given"

_MONTH = (
    r"(?i:jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?|sept?(?:ember)?"
    r"|oct(?:ober)?|nov(?:ember)?|dec(?:ember)?)\b\.?"
)
# A month without a year: "may" and "march" are verbs, too, and "mar", "sep" and "dec" are cut words.
_SURE_MONTH = (
    r"(?:(?i:january|february|april|june|july|august|september|october|november|december)|March|MARCH|May"
    r"|(?:Jan|JAN|Feb|FEB|Mar|Apr|APR|Jun|JUN|Jul|JUL|Aug|AUG|Sept?|SEPT?|Oct|OCT|Nov|NOV|Dec|DEC)\b\.?)"
)
_DAY = r"(?:0?[1-9]|[12]\d|3[01])(?i:st|nd|rd|th)?\b"
_YEAR = r"(?:(?:19|20)\d\d\b|['’]\d\d\b)"
_D, _M, _Y = r"(?:0?[1-9]|[12]\d|3[01])", r"(?:0?[1-9]|1[0-2])", r"(?:(?:19|20)\d\d|\d\d)"
_CLOCK = r"(?:[01]?\d|2[0-3]):[0-5]\d(?::[0-5]\d(?:\.\d{1,6})?)?"
_UNIT = r"\s?(?:%|(?i:mm|cm|m?l|mg|kg|g|cc|min|minutes?|s|sec|hu|h|x|days?|weeks?|months?|years?)\b)"
_VALUE = r"[\w#](?:[\w./#-]{0,38}\w)?"
_NUMBER_OF = r"(?:\s?(?:number|num|no|nr|id)\b\.?|\s?#)"


def _rule(pattern: str, kept: str = "") -> tuple[re.Pattern[str], str]:
    """Return a pattern and what is put in its place: the mark behind the groups that stay."""
    return re.compile(pattern), kept + MARK


RULES = (
    # what others took out
    _rule(r"\[\*\*[^\]]{0,200}\*\*\]"),
    _rule(r"_{2,}"),
    # addresses of machines: e-mail, web, folders, files
    _rule(r"(?<![\w.+-])[\w.+-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63}){0,8}"),
    _rule(r"(?i)\b(?:https?|ftps?|sftp|file|s3|dicom)://[^\s<>\"]{1,2000}|\bwww\.[^\s<>\"]{1,2000}"),
    _rule(r"(?i)(?<![\w.-])(?:[a-z][\w-]{0,62}\.){1,5}(?:com|org|net|edu|gov|info)\b(?:/[^\s]{0,2000})?"),
    _rule(r"\b[A-Za-z]:[\\/][^\s\"]{1,400}|\\\\[^\s\"]{1,400}"),
    _rule(r"(?<![\w./+-])(?:~|\.{1,2})?/(?:[\w.@-]{1,100}/){1,20}[\w.@-]{0,100}"),
    _rule(
        r"(?i)(?<![\w./-])[\w()./-]{1,200}\.(?:dcm|dicom|ima|nii|gz|jpe?g|png|tiff?|svs|ndpi|mrxs|pdf|docx?|txt|rtf"
        r"|csv|xlsx?|xml|hl7|zip)\b"
    ),
    # unique identifiers of DICOM, and addresses of machines in numbers
    _rule(r"(?<![\w.])\d{1,10}(?:\.\d{1,64}){3,30}|(?<![\w.])1\.2\.840(?:\.\d{1,64}){0,30}"),
    _rule(r"(?i)\b[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}\b"),
    # numbers that a word announces, or that show by themselves that they are of social security
    _rule(r"\b\d{3}([\s-])\d{2}\1\d{4}\b"),
    _rule(
        rf"(?i)\b((?:mrn|uid|ssn|dob|accession{_NUMBER_OF}?|acc{_NUMBER_OF}|medical\s?record{_NUMBER_OF}?"
        rf"|social\s?security{_NUMBER_OF}?|(?:patient|pat|pt|case|study|exam|order|account|acct|encounter|visit|chart"
        rf"|specimen|record|hospital|unit|nhs|insurance|policy|member|device|serial|license){_NUMBER_OF}"
        rf"|(?:id|identifier|mr\s?#|record|ref|reference)(?=\s?[:#]))\s?[:#=]{{0,2}}\s?)(?=[\w./#-]{{0,38}}\d){_VALUE}",
        r"\1",
    ),
    _rule(rf"(?i)\b((?:mrn|patient\sid|id|accession)\s?[:#]\s?){_VALUE}", r"\1"),
    # dates, with the time behind them
    _rule(
        rf"(?<![\w./-])(?:(?:19|20)\d\d(?:(?P<a>\s?/\s?|[-.]){_M}(?P=a){_D})"
        rf"|{_D}(?P<b>\s?/\s?|[-.]){_M}(?P=b){_Y}|{_M}(?P<c>\s?/\s?|[-.]){_D}(?P=c){_Y})"
        rf"(?:T{_CLOCK}(?:Z|[+-]\d\d:?\d\d)?)?(?!\w|[-/.]\d|{_UNIT})"
    ),
    _rule(rf"(?<![\w./-])(?:{_M}/(?:19|20)\d\d|(?:19|20)\d\d[-/](?:0[1-9]|1[0-2]))(?!\w|[-/.]\d)"),
    _rule(rf"\b{_D}-{_MONTH}-{_Y}\b"),
    _rule(
        rf"(?:\b{_DAY}[\s-]{{0,2}}(?i:of\s)?)?\b{_MONTH}[\s,-]{{0,2}}(?:{_DAY}[\s,]{{1,2}})?(?i:of\s)?{_YEAR}"
    ),
    _rule(rf"\b{_SURE_MONTH}\s(?i:the\s)?{_DAY}(?![.]\d|{_UNIT})"),
    _rule(rf"(?<![.\w-]){_DAY}\s(?i:of\s)?{_SURE_MONTH}(?<!MAY)(?<!MARCH)(?!\w)"),
    _rule(r"(?i)\b(?:january|february|april|june|july|august|september|october|november|december)\b"),
    _rule(
        rf"(?i)\b((?:on|dated?|since|until|performed|comparison|compared\s(?:to|with)|(?:exam|examination|study|film"
        rf"|radiographs?|ct|mri|scan)\s(?:of|from))\s?:?\s?(?:the\s)?)(?:{_M}/{_D}|{_D}/{_M})(?![\w/]|{_UNIT}|\.\d)",
        r"\1",
    ),
    _rule(rf"(?i)\b((?:in|since|year|dated|born)\s)(?:19|20)\d\d(?!\w|[.-]\d|\s(?:patient|case|subject)|{_UNIT})", r"\1"),
    # times; on the breast, a time of day is a place
    _rule(
        rf"(?<![\w:.])(?:{_CLOCK}|\d{{1,2}})\s?(?i:[ap]\.\s?m\.|[ap]m\b)"
        rf"|(?<![\w:.])(?<!(?i:reast)\s)(?<!(?i:reast\sat)\s)(?:[01]\d|2[0-3]|1[0-2]):[0-5]\d(?::[0-5]\d(?:\.\d{{1,6}})?)?"
        rf"(?![\w:]|,?\s(?i:position|o.clock|axis|\d{{1,2}}(?:\.\d)?\scm))"
    ),
    _rule(
        rf"(?i)\b((?:at|time|approximately|around)\s?:?\s)(?:{_CLOCK}|[0-2]\d[0-5]\d(?=\s?(?:h|hrs|hours)\b))"
        r"(?![\w:]|,?\s(?:position|o.clock|axis|\d{1,2}(?:\.\d)?\scm))",
        r"\1",
    ),
    # telephones
    _rule(r"(?<![\w.-])\+\d{1,3}(?:[\s().-]{0,3}\d){6,12}\b|(?<![\w.-])0\d(?:[\s.]\d\d){4}\b"),
    _rule(r"(?<![\w.-])(?:\d[\s.-])?\(?\d{3}\)?[\s./-]{1,2}\d{3}[\s.-]\d{4}\b"),
    _rule(
        r"(?i)\b((?:tele?phone|phone|tel|fax|mobile|cell|pager|beeper|ext|extension)\b\.?\s?(?:number|no\.?)?\s?"
        r"[:#]{0,2}\s?)\(?\d[\d\s().-]{1,18}\d\b",
        r"\1",
    ),
    # numbers by their looks: zip behind a state, five digits in a row, letters before many digits, mixed codes
    _rule(r"\b[A-Z]{2}\s\d{5}(?:-\d{4})?\b"),
    _rule(r"(?<![\w-])[\w-]{0,40}?\d{5}[\w-]{0,80}|\d{5,}"),
    _rule(r"(?<![\w-])(?!(?i:b|tr|te|ti|fov|hu)-?\d)[A-Za-z]{1,6}-?\d{4,40}\b|(?<![\w-])[A-Z]{1,3}\d{2}-\d{3,40}\b"),
    _rule(r"(?<!\w)(?=(?:[A-Za-z]{0,60}\d){4})(?=\d{0,60}[A-Za-z])(?!\d{1,4}[A-Za-z]{1,60}\b)[A-Za-z0-9]{8,64}\b"),
    # ages over 89
    _rule(r"\b(?:9\d|1[0-2]\d)(?=[\s-]?(?i:(?:year|yr)s?[\s-](?:old|of\sage)|y\.?\s?/?o\b|y\.o\.))"),
    _rule(r"(?i)\b(age[d]?\s?:?\s)(?:9\d|1[0-2]\d)\b(?!\s?[-%/.]\s?\d)", r"\1"),
    _rule(r"\b(?:9\d|1[0-2]\d)\s?[MF]\b(?=\s(?i:with|w/|s/p|presents|status|who|here)|,)"),
    _rule(r"(?i)\bninety(?:[\s-](?:one|two|three|four|five|six|seven|eight|nine))?(?=[\s-]years?[\s-]old)"),
    # streets, towns, houses
    _rule(
        rf"(?<![\w.])\d{{1,5}}\s(?:{_PROPER}\s|\d{{1,3}}(?:st|nd|rd|th)\s){{1,3}}"
        r"(?:(?i:street|avenue|road|boulevard|lane|drive|parkway|highway)\b|(?:Ave|Rd|Blvd|Ln|Pkwy|Hwy)\b\.?"
        r"|St\b\.?(?=\s?(?:,|$|Apt|Suite|\d)))"
    ),
    _rule(r"(?i)\b(?:p\.?\s?o\.?\s)box\s\d{1,6}\b|\b(?:apt|suite)\b\.?\s?#?\d{1,5}[a-z]?\b"),
    _rule(r"(?i)\b((?:zip(?:\s?code)?|post(?:al)?\s?code)\s?:?\s?)(?=\w{0,8}\d)\w{2,8}(?:\s\d\w{2}\b)?", r"\1"),
    _rule(r"(?i)\b((?:home\s|street\s|mailing\s)?address\s?:\s?)[^.;:\n]{1,120}", r"\1"),
    _rule(
        rf"{_CAPITAL}(?:St\.\s)?(?:{_PROPER}\s(?:(?i:of|and|for)\s)?){{1,4}}(?:(?i:hospitals?|infirmary|university)|Clinic|CLINIC"
        r"|(?i:medical\scent(?:er|re))|(?i:health\s?(?:system|cent(?:er|re))))\b"
    ),
    # people
    _rule(r"\b[A-Za-z]{2,40}(?:\^[A-Za-z.' -]{0,40}){1,4}(?<! )"),
    _rule(
        rf"\b(?:(?:(?i:drs?|prof|mrs)\.|Drs?|Prof|Mrs|MRS|Mr\.?|Ms\.?|Miss|Doctor|Professor)\s(?:med\.\s)?){{1,3}}{_FULL}"
    ),
    _rule(rf"\b(?:(?:drs?|prof|mrs)\.|dr)\s{_PLAIN}(?:\s{_PLAIN})?"),
    # MR is an examination and MS a disease: only where a sentence begins are they titles
    _rule(rf"((?:^|[.;:]\s))(?i:m[rs]\.)\s(?:{_FULL}|{_PLAIN})", r"\1"),
    _rule(rf"{_CAPITAL}{_FULL},\s?(?:M\.?D\b\.?|D\.O\.|Ph\.?D\b\.?|R\.?N\b\.?|MBBS\b|FRCR\b|FRCPC\b|PA-C\b)"),
    _rule(
        rf"\b((?i:(?:dictated|signed|transcribed|interpreted|read|reviewed|approved|verified|finalized|reported|performed"
        rf"|ordered|prepared|entered|authored)\s(?:and\s\w{{1,20}}\s)?by|electronically\ssigned)\s?:?\s){_LISTED}",
        r"\1",
    ),
    _rule(rf"(?i)\b((?:dictated|signed|transcribed)\sby\s?:?\s){_PLAIN}(?:,?\s{_PLAIN})?", r"\1"),
    _rule(
        rf"\b((?i:patient(?:['’]?s)?(?:\sname)?|attending(?:\s(?:physician|radiologist))?|radiologist|physician|doctor"
        rf"|provider|resident|fellow|technologist|surgeon|consultant|author|dictator|reader|reviewer|requested\sfor"
        rf"|(?:referring|ordering|requesting)\s(?:physician|doctor|md|provider))\s?:\s?){_LISTED}",
        r"\1",
    ),
    _rule(rf"(?i)\b((?:(?:patient|first|last|family|given|full|mother['’]?s|maiden)\s)?(?:sur)?name\s?:\s?)"
          rf"{_PLAIN}(?:,?\s(?:[a-z]\.|{_PLAIN})){{0,2}}", r"\1"),
    # several marks in a row are one
    _rule(rf"{MARK}(?:[\s,/-]{{0,3}}{MARK})+"),
)  # fmt: skip


def hide_identifiers(text: str) -> str:
    """Put the mark in place of what looks like an identifier; a second time changes nothing more."""
    for _ in range(_MOST_ROUNDS):
        before = text
        for pattern, replacement in RULES:
            text = pattern.sub(replacement, text)
        if text == before:
            break
    return text
