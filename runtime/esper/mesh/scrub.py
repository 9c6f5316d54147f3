"""Takes credentials out of everything that is about to be logged.

Two nets: names (a field called `password`, `api_key`, `authorization`, ... loses its value whatever it holds) and
shapes (a string that contains something formed like a credential loses that part, wherever it stands: in a sentence,
in JSON inside a string, in a URL, in a traceback). Digests, run ids, UUIDs and the like pass unharmed.
"""

import functools
import re
from collections.abc import Mapping
from typing import Any

__all__ = ["MASK", "is_secret_name", "scrub", "scrub_text"]

MASK = "[redacted]"

# Names that say it wherever they end in this: dbpassword, awsSecretAccessKey.
_CLEAR = (
    r"pass(?:word|wd|phrase|code)|pwd|secret|credential|api_?key"
    r"|(?:access|secret|private|signing|encryption|account|subscription|master|hmac)_?key"
)
# Names that say it only as a word of their own: auth and db_auth, not author.
_APART = (
    r"authorization|cookie|session_?id|jwt|otp|dsn|mnemonic|auth|auth(?:orization)?_?header|connection_?string|conn_?str"
    r"|(?:service|client|session|ssh|deploy|license|recovery|storage|webhook|root|openai|anthropic|google|gemini|azure|aws"
    r"|github|gitlab|huggingface|hf|wandb|cohere|mistral|groq|openrouter|stripe|sendgrid|twilio|datadog|grafana)_?key"
    r"|(?:access|auth|refresh|id|session|bearer|security|identity|csrf|xsrf|api|bot|oauth|personal)_?token"
)
# Several, or numbered: api_keys, password2. A `token` is a secret, `tokens` are counted; `pass_1` is a round.
_NAME = re.compile(
    rf"(?:.*(?:{_CLEAR})|(?:.*[_.\- ])?(?:{_APART}))s?_?\d{{0,4}}|.*token_?\d{{0,4}}|(?:.*[_.\- ])?pass",
    re.IGNORECASE,
)
_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
_QUOTED = re.compile(r"b?(['\"])(.*)\1", re.DOTALL)

# name = value, in assignments, JSON, YAML, headers, command lines, connection strings: whether the name is a secret's
# is asked of `is_secret_name`, as for fields. Quoted values go to their quote, lists to their end, bare ones to the
# next blank or separator, with the scheme of an authorization before it.
_ASSIGNED = re.compile(r"([\w.\-]{1,64}+)\\{0,4}[\"']?\s*(?:=>|:=|[:=])\s*")
_FLAG = re.compile(r"(?<!\S)--?([\w.\-]{1,64}+)\s+(?!-)")  # --password hunter2
_VALUE = re.compile(
    r"(?!\\{0,4}[\"']?\[redacted)(?:"
    r"[bru]?\\{0,4}\"(?:[^\"\\]|\\[^\"])*\\?\"|[bru]?'(?:[^'\\]|\\.)*'|[\[({][^\])}\r\n]{0,2000}[\])}]?"
    r"|(?:(?:bearer|basic|digest|negotiate|apikey|token)\s+)?[^\s,;&\"'}\])]+)",
    re.IGNORECASE,
)
# Headers whose value has blanks and separators in it.
_HEADER = re.compile(r"(?:.*[_.\-])?(?:authorization|cookie|auth_?header)(?:_?header)?", re.IGNORECASE)
_LINE = re.compile(r"(?!\\{0,4}[\"']?\[redacted)\\{0,4}[\"']?[^\r\n\"'}]+")

# Each shape with fragments of which every match has one, in lower case: plain substring tests are ten times faster than
# the patterns, and most texts hold nothing of the kind. Shapes without fragments have `_RARE` in their place.
_SHAPES: tuple[tuple[tuple[str, ...], re.Pattern[str], str], ...] = (
    # PEM blocks; a block that was cut off counts to the end of the text. Escaped newlines as in JSON included.
    (
        ("private key",),
        re.compile(
            r"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----"
            r".*?(?:-----END (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----|\Z)",
            re.DOTALL,
        ),
        MASK,
    ),
    # scheme://user:password@host; the user stays, because it is what one looks for in a log. A password with a slash
    # in it is told from a port and a path by not being a number.
    (
        ("://",),
        re.compile(
            r"(\b[a-zA-Z][\w+.\-]{1,30}://[^\s:/@\"']{0,80}):"
            r"(?:[^\s/\"']{1,200}@|(?!\d{1,5}[/?#])[^\s@\"']{1,200}@)"
        ),
        rf"\1:{MASK}@",
    ),
    # scheme://token@host, as git remotes and Sentry DSNs have it.
    (("://",), re.compile(r"(\bhttps?://)[\w\-]{16,}@"), rf"\1{MASK}@"),
    (("eyj",), re.compile(r"\beyJ[\w\-]{5,}\.[\w\-]{5,}(?:\.[\w\-]*){1,3}"), MASK),  # JWT, JWE
    # "bearer authentication" and the like are prose.
    (
        ("bearer", "apikey"),
        re.compile(
            r"\b(bearer|apikey)(\s+)(?!realm|(?-i:[a-z]{1,20})(?![\w\-.~+/:=]))[\w\-.~+/:]{8,}=*", re.IGNORECASE
        ),
        rf"\1\2{MASK}",
    ),
    # Their names are words of other trades, too: "digest sha256:...", "basic convolution".
    (
        ("basic", "negotiate", "digest"),
        re.compile(
            r"(\bauth\w{0,20}\b[^\r\n]{0,40}?\b(?:basic|negotiate|digest)\s+)(?!sha\d|realm)[\w\-.~+/:]{8,}=*",
            re.IGNORECASE,
        ),
        rf"\1{MASK}",
    ),
    (
        ("akia", "asia", "abia", "acca", "aroa", "aida", "agpa", "anpa"),
        re.compile(r"\b(?:AKIA|ASIA|ABIA|ACCA|AROA|AIDA|AGPA|ANPA)[A-Z0-9]{16}\b"),
        MASK,
    ),  # AWS
    (
        ("ghp_", "gho_", "ghu_", "ghs_", "ghr_", "github_pat"),
        re.compile(r"\b(?:gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,})"),
        MASK,
    ),
    (
        ("glpat-", "gldt-", "glrt-", "glcbt-", "glptt-", "glsoat-"),
        re.compile(r"\bgl(?:pat|dt|rt|cbt|ptt|soat)-[\w\-]{16,}"),
        MASK,
    ),  # GitLab
    (("glsa_",), re.compile(r"\bglsa_\w{20,}"), MASK),  # Grafana
    (("tskey-",), re.compile(r"\btskey-[\w\-]{10,}"), MASK),  # Tailscale
    (("xox", "xapp-"), re.compile(r"\bx(?:ox[a-z]|app)-[\w\-]{8,}", re.IGNORECASE), MASK),  # Slack
    (
        ("hooks.slack.com",),
        re.compile(r"(https://hooks\.slack\.com/(?:services|workflows|triggers)/)[\w/\-]+"),
        rf"\1{MASK}",
    ),
    (
        ("/api/webhooks/",),
        re.compile(r"(https://(?:\w+\.)?discord(?:app)?\.com/api/webhooks/)[\w/\-]+"),
        rf"\1{MASK}",
    ),
    (("aiza",), re.compile(r"\bAIza[\w\-]{35}"), MASK),  # Google API key
    (
        ("ya29.", "1//0", "gocspx-"),
        re.compile(r"\b(?:ya29\.[\w\-]{10,}|1//0[\w\-]{20,}|GOCSPX-[\w\-]{20,})"),
        MASK,
    ),  # Google OAuth
    (
        ("_live_", "_test_", "whsec_"),
        re.compile(r"\b(?:[sr]k|pk)_(?:live|test)_[A-Za-z0-9]{8,}|\bwhsec_[\w+/=]{8,}"),
        MASK,
    ),  # Stripe
    (("sk-",), re.compile(r"\bsk-(?:ant-|proj-|svcacct-|or-v1-)?[\w\-]{20,}"), MASK),  # model vendors
    (("hf_",), re.compile(r"\bhf_[A-Za-z0-9]{20,}"), MASK),
    (("sg.",), re.compile(r"\bSG\.[\w\-]{16,}\.[\w\-]{16,}"), MASK),  # SendGrid
    ((), re.compile(r"\b(?:SK|AC)[0-9a-f]{32}\b"), MASK),  # Twilio
    (("npm_",), re.compile(r"\bnpm_[A-Za-z0-9]{30,}"), MASK),
    (("pypi-",), re.compile(r"\bpypi-[\w\-]{30,}"), MASK),
    (("_v1_",), re.compile(r"\bdo[opr]_v1_[0-9a-f]{32,}"), MASK),  # DigitalOcean
    (
        ("shpat_", "shpca_", "shppa_", "shpss_"),
        re.compile(r"\bshp(?:at|ca|pa|ss)_[0-9a-fA-F]{32}"),
        MASK,
    ),  # Shopify
    ((), re.compile(r"\b(?:hv[sbr]|s)\.[A-Za-z0-9_\-]{24,}"), MASK),  # Vault
    (("dapi",), re.compile(r"\bdapi[0-9a-f]{32}\b"), MASK),  # Databricks
    (("age-secret-key-",), re.compile(r"\bAGE-SECRET-KEY-1[A-Z0-9]{50,}"), MASK),
    ((":aa",), re.compile(r"\b\d{8,10}:AA[\w\-]{30,}"), MASK),  # Telegram
    ((), re.compile(r"\b[MNO][A-Za-z\d_\-]{23,27}\.[\w\-]{6}\.[\w\-]{27,}"), MASK),  # Discord
    (
        ("sig", "key=", "code=", "security-token="),
        re.compile(
            r"([?&](?:sig|signature|x-amz-signature|x-goog-signature|x-amz-security-token|key|code)=)[^&\s\"']{8,}",
            re.IGNORECASE,
        ),
        rf"\1{MASK}",
    ),  # signed URLs
    (
        ("sharedaccesssignature=",),
        re.compile(r"(\bSharedAccessSignature=)[^;\s\"']+", re.IGNORECASE),
        rf"\1{MASK}",
    ),
)

# One of these is in every name that `is_secret_name` knows.
_NAMING = (
    "pass", "pwd", "secret", "credential", "key", "token", "auth", "cookie", "session", "jwt", "otp", "dsn", "mnemonic",
    "conn",
)  # fmt: skip
_RARE = re.compile(r"\b(?:SK|AC)[0-9a-f]{32}|\b(?:hv[sbr]|s)\.[A-Za-z0-9_\-]{24}|\.[\w\-]{6}\.[\w\-]{27}")
_FRAGMENTS = {*_NAMING, *(fragment for fragments, _, _ in _SHAPES for fragment in fragments)}
# What contains another one is found with that.
_FEWEST = tuple(one for one in sorted(_FRAGMENTS) if not any(other in one for other in _FRAGMENTS - {one}))

_MAX_DEPTH = 12


@functools.lru_cache(4096)
def is_secret_name(name: str) -> bool:
    """Whether a field of this name must never be shown: `db_password`, `apiKey`, `X-Auth-Token`, `authorization`."""
    quoted = _QUOTED.fullmatch(name)  # the key of a mapping that was spelled out, bytes included
    return _NAME.fullmatch(_CAMEL.sub("_", quoted[2] if quoted else name).replace("-", "_")) is not None


def scrub_text(text: str) -> str:
    """Return the text with every credential-shaped part replaced by `[redacted]`."""
    low = text.lower()
    if not any(fragment in low for fragment in _FEWEST) and _RARE.search(text) is None:
        return text
    for fragments, pattern, replacement in _SHAPES:
        if not fragments or any(fragment in low for fragment in fragments):
            text = pattern.sub(replacement, text)
    if any(fragment in low for fragment in _NAMING):
        text = _without_values(_without_values(text, _ASSIGNED), _FLAG)
    return text


def _without_values(text: str, named: re.Pattern[str]) -> str:
    """Mask what follows the name of a secret."""
    parts, at = [], 0
    for found in named.finditer(text):
        name = found[1]
        # A name may stand inside of a value that is gone already.
        if found.start() < at or not is_secret_name(name):
            continue
        value = (_LINE if _HEADER.fullmatch(name) else _VALUE).match(text, found.end())
        if value is not None:
            parts += [text[at : found.end()], MASK]
            at = value.end()
    return "".join([*parts, text[at:]]) if parts else text


_scrub_name = functools.lru_cache(4096)(scrub_text)  # names of fields recur in every record


def scrub(value: Any, *, _depth: int = 0) -> Any:
    """Return a copy of plain data (mappings, lists, strings, numbers) without credentials.

    Nesting beyond twelve levels is cut off: what is not looked at is not logged.
    """
    if isinstance(value, str):
        return scrub_text(value)
    if _depth >= _MAX_DEPTH:
        return "[too deep]"
    if isinstance(value, Mapping):
        return {
            _scrub_name(str(key)): MASK
            if is_secret_name(str(key)) and item is not None and item is not False and item is not True
            else scrub(item, _depth=_depth + 1)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple | set | frozenset):
        return [scrub(item, _depth=_depth + 1) for item in value]
    return value
