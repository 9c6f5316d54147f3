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

_SENSITIVE = (
    r"pass(?:word|wd|phrase|code)?|pwd|secrets?|credentials?|authorization|cookie|set_cookie|session_?id|api_?key|apikey"
    r"|(?:access|secret|private|signing|encryption|account|shared_access|subscription|master|service|client)_?key"
    r"|(?:access|auth|refresh|id|session|bearer|security|identity|csrf|xsrf|api|bot|oauth|personal)_?token|token|jwt"
    r"|client_?secret|connection_?string|conn_?str|dsn|otp|mnemonic|signature_?secret|webhook_?secret|auth"
)
_NAME = re.compile(rf"(?:^|.*[_.\- ])(?:{_SENSITIVE})", re.IGNORECASE)
_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")

# In running text a name counts as a secret's name also behind a prefix: DB_PASSWORD, x-api-key, awsSecretAccessKey.
_IN_TEXT = (
    r"[\w.\-]{0,40}?(?:pass(?:word|wd|phrase)|pwd|secret|token|api[_\-]?key|apikey|credentials?"
    r"|(?:access|secret|private|signing|encryption|account|shared[_\-]?access|subscription|master)[_\-]?key)"
)

_SHAPES: tuple[tuple[re.Pattern[str], str], ...] = (
    # PEM blocks; a block that was cut off counts to the end of the text. Escaped newlines as in JSON included.
    (
        re.compile(
            r"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----"
            r".*?(?:-----END (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----|\Z)",
            re.DOTALL,
        ),
        MASK,
    ),
    # scheme://user:password@host; the user stays, because it is what one looks for in a log.
    (re.compile(r"(\b[a-zA-Z][\w+.\-]{1,30}://[^\s:/@\"']{0,80}):[^\s/\"']{1,200}@"), rf"\1:{MASK}@"),
    # scheme://token@host, as git remotes and Sentry DSNs have it.
    (re.compile(r"(\bhttps?://)[\w\-]{16,}@"), rf"\1{MASK}@"),
    (re.compile(r"\beyJ[\w\-]{5,}\.[\w\-]{5,}(?:\.[\w\-]*){1,3}"), MASK),  # JWT, JWE
    (
        re.compile(r"\b(bearer|basic|negotiate|digest|apikey)(\s+)(?!realm)[\w\-.~+/:]{8,}=*", re.IGNORECASE),
        rf"\1\2{MASK}",
    ),
    (
        re.compile(
            r"\b(authorization|proxy-authorization|cookie|set-cookie)(\\?[\"']?\s*[:=]\s*\\?[\"']?)(?!\[redacted)"
            r"[^\r\n\"'}]+",
            re.IGNORECASE,
        ),
        rf"\1\2{MASK}",
    ),
    (re.compile(r"\b(?:AKIA|ASIA|ABIA|ACCA|AROA|AIDA|AGPA|ANPA)[A-Z0-9]{16}\b"), MASK),  # AWS
    (re.compile(r"\b(?:gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,})"), MASK),
    (re.compile(r"\bgl(?:pat|dt|rt|cbt|ptt|soat)-[\w\-]{16,}"), MASK),  # GitLab
    (re.compile(r"\bx(?:ox[a-z]|app)-[\w\-]{8,}", re.IGNORECASE), MASK),  # Slack
    (re.compile(r"(https://hooks\.slack\.com/(?:services|workflows|triggers)/)[\w/\-]+"), rf"\1{MASK}"),
    (re.compile(r"(https://(?:\w+\.)?discord(?:app)?\.com/api/webhooks/)[\w/\-]+"), rf"\1{MASK}"),
    (re.compile(r"\bAIza[\w\-]{35}"), MASK),  # Google API key
    (re.compile(r"\b(?:ya29\.[\w\-]{10,}|1//0[\w\-]{20,}|GOCSPX-[\w\-]{20,})"), MASK),  # Google OAuth
    (re.compile(r"\b(?:[sr]k|pk)_(?:live|test)_[A-Za-z0-9]{8,}|\bwhsec_[\w+/=]{8,}"), MASK),  # Stripe
    (re.compile(r"\bsk-(?:ant-|proj-|svcacct-|or-v1-)?[\w\-]{20,}"), MASK),  # model vendors
    (re.compile(r"\bhf_[A-Za-z0-9]{20,}"), MASK),
    (re.compile(r"\bSG\.[\w\-]{16,}\.[\w\-]{16,}"), MASK),  # SendGrid
    (re.compile(r"\b(?:SK|AC)[0-9a-f]{32}\b"), MASK),  # Twilio
    (re.compile(r"\bnpm_[A-Za-z0-9]{30,}"), MASK),
    (re.compile(r"\bpypi-[\w\-]{30,}"), MASK),
    (re.compile(r"\bdo[opr]_v1_[0-9a-f]{32,}"), MASK),  # DigitalOcean
    (re.compile(r"\bshp(?:at|ca|pa|ss)_[0-9a-fA-F]{32}"), MASK),  # Shopify
    (re.compile(r"\b(?:hv[sbr]|s)\.[A-Za-z0-9_\-]{24,}"), MASK),  # Vault
    (re.compile(r"\bdapi[0-9a-f]{32}\b"), MASK),  # Databricks
    (re.compile(r"\bAGE-SECRET-KEY-1[A-Z0-9]{50,}"), MASK),
    (re.compile(r"\b\d{8,10}:AA[\w\-]{30,}"), MASK),  # Telegram
    (re.compile(r"\b[MNO][A-Za-z\d_\-]{23,27}\.[\w\-]{6}\.[\w\-]{27,}"), MASK),  # Discord
    (
        re.compile(
            r"([?&](?:sig|signature|x-amz-signature|x-goog-signature|x-amz-security-token|key|code)=)[^&\s\"']{8,}",
            re.IGNORECASE,
        ),
        rf"\1{MASK}",
    ),  # signed URLs
    (re.compile(r"(\b(?:AccountKey|SharedAccessKey|SharedAccessSignature)=)[^;\s\"']+", re.IGNORECASE), rf"\1{MASK}"),
    # name = value, in assignments, JSON, YAML, headers, command lines, connection strings. Quoted values to their
    # quote, bare ones to the next blank or separator.
    (
        re.compile(
            rf"(?<![\w.\-])(-{{0,2}}{_IN_TEXT})(\\?[\"']?\s*(?:=>|:=|[:=])\s*)"
            r"(?:[bru]?\\?\"(?:[^\"\\]|\\[^\"])*\\?\"|[bru]?'(?:[^'\\]|\\.)*'|(?!\[redacted)[^\s,;&\"'}\])]+)",
            re.IGNORECASE,
        ),
        rf"\1\2{MASK}",
    ),
    # --password hunter2
    (re.compile(rf"(?<!\S)(--?{_IN_TEXT})(\s+)(?!-)[^\s\"']+", re.IGNORECASE), rf"\1\2{MASK}"),
)

# Most texts hold nothing of the kind. Every shape above contains one of these fragments in lower case, or matches the
# pattern below them; plain substring tests are ten times faster than one large alternation.
_FRAGMENTS = (
    "://", "key", "pass", "pwd", "secret", "token", "credential", "sig", "code=", "authorization", "cookie",
    "bearer", "basic", "negotiate", "digest", "eyj", "akia", "asia", "abia", "acca", "aroa", "aida", "agpa", "anpa",
    "ghp_", "gho_", "ghu_", "ghs_", "ghr_", "github_pat", "glpat-", "gldt-", "glrt-", "glcbt-", "glptt-", "glsoat-",
    "xox", "xapp-", "aiza", "ya29", "1//0", "gocspx", "_live_", "_test_", "whsec_", "sk-", "hf_", "sg.", "npm_",
    "pypi-", "_v1_", "shpat_", "shpca_", "shppa_", "shpss_", "hvs.", "hvb.", "hvr.", "dapi", ":aa",
)  # fmt: skip
_RARE = re.compile(r"\b(?:SK|AC)[0-9a-f]{32}|\bs\.[A-Za-z0-9_\-]{24}|\.[\w\-]{6}\.[\w\-]{27}")

_MAX_DEPTH = 12


@functools.lru_cache(4096)
def is_secret_name(name: str) -> bool:
    """Whether a field of this name must never be shown: `db_password`, `apiKey`, `X-Auth-Token`, `authorization`."""
    return _NAME.fullmatch(_CAMEL.sub("_", name).replace("-", "_")) is not None


def scrub_text(text: str) -> str:
    """Return the text with every credential-shaped part replaced by `[redacted]`."""
    low = text.lower()
    if not any(fragment in low for fragment in _FRAGMENTS) and _RARE.search(text) is None:
        return text
    for pattern, replacement in _SHAPES:
        text = pattern.sub(replacement, text)
    return text


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
