"""Masks secrets in text, and recognises names of variables and files that hold secrets.

Whatever leaves a process (a line on the terminal, a log, a parameter, a manifest, a diff, a file that is sent) passes
through `redacted`; files that are logged as they are must not contain what it would change. Pure, and linear in the
length of the text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from fnmatch import fnmatchcase
from itertools import islice
from pathlib import PurePosixPath

MASK = "***"

SECRET_FILES = (
    ".env", ".env.*", "*.env", ".envrc", "*.tfvars", "*.tfstate",
    "*.pem", "*.key", "*.p12", "*.pfx", "*.jks", "*.keystore", "*.kdbx", "*.ppk",
    "id_rsa*", "id_dsa*", "id_ecdsa*", "id_ed25519*",
    "*secret*", "*credential*", "*password*", "*passwd*", "*.token", "auth_token",
    ".netrc", "_netrc", ".npmrc", ".pypirc", ".pgpass", ".my.cnf", ".git-credentials", ".htpasswd", ".dockercfg",
    ".boto", ".s3cfg", "rclone.conf", "kaggle.json", "kubeconfig*", "*.kubeconfig", "*service-account*.json",
    "*service_account*.json", "*serviceaccount*.json", ".ssh", ".aws", ".azure", ".gnupg", ".kube", ".docker",
)  # fmt: skip
"""Names of files and folders that hold secrets, in the syntax of .gitignore; lower case matches both cases."""

_WORD = re.compile(r"[A-Z0-9]+(?![a-z])|[A-Z]?[a-z0-9]+")
# Anywhere in a name, without its separators.
_SECRET_WITHIN = re.compile(
    r"SECRET|PASSWORD|PASSWD|PASSPHRASE|PASSCODE|CREDENTIAL|CONNECTIONSTRING|CONNSTR|SHAREDACCESS|TOKEN(?!IZ|S$)"
)
# A whole word of a name, and its last word.
_SECRET_WORDS = {"KEY", "APIKEY", "ACCESSKEY", "SECRETKEY", "PRIVATEKEY", "AUTHKEY", "ACCOUNTKEY"}
_SECRET_LAST = {
    "AUTH", "AUTHORIZATION", "COOKIE", "CRED", "CREDS", "DSN", "JWT", "PASS", "PAT", "PWD", "SAS", "SIG", "SIGNATURE",
    "TOKENS", "USERPASS",
}  # fmt: skip
_SECRET_ENDS = re.compile(r"(^|_)(DATABASE|DB)_UR[LI]$")
_HARMLESS_KEY = re.compile(r"(CACHE|FOREIGN|GROUP|OBJECT|PARTITION|PRIMARY|PUBLIC|RUN|SHARE|SORT)_KEY")
_FOLDERS = {"PWD", "OLDPWD"}
"""The shell's current and last folder, not passwords."""
_COUNTS = {"MAX", "MIN", "NUM", "N", "TOTAL", "TOKENS"}
"""First words in the name of a number of tokens."""


def is_secret_name(name: str) -> bool:
    """Whether a variable, key or parameter of this name (`MLFLOW_TRACKING_PASSWORD`, `accessKey`) holds a secret."""
    if name in _FOLDERS:
        return False
    words = [word.upper() for word in _WORD.findall(name)]
    if not words or (words[-1] == "TOKENS" and words[0] in _COUNTS):
        return False
    joined = _HARMLESS_KEY.sub("", "_".join(words))
    return (
        bool(_SECRET_WITHIN.search(joined.replace("_", "")))
        or not _SECRET_WORDS.isdisjoint(joined.split("_"))
        or words[-1] in _SECRET_LAST
        or bool(_SECRET_ENDS.search(joined))
    )


def is_secret_file(path: str) -> bool:
    """Whether the name of the file, or of a folder above it, matches SECRET_FILES."""
    parts = PurePosixPath(path.replace("\\", "/")).parts
    return any(fnmatchcase(part.lower(), pattern) for part in parts for pattern in SECRET_FILES)


def redacted(text: str) -> str:
    """`text` with `***` in place of every secret that its form gives away.

    These are: the user and password of a URL, whatever characters they contain; values of secret names
    (`is_secret_name`) in queries, `name=value`, YAML, JSON, headers and options; private keys; tokens with a known
    prefix. Text without secrets is returned unchanged, and so is the output of this function.
    """
    text = _PRIVATE_KEY.sub("[private key ***]", text) if "PRIVATE KEY" in text else text
    return _TOKEN.sub(MASK, _without_named_values(_without_user_info(text)))


def holds_secret(text: str) -> bool:
    return redacted(text) != text


def redacted_value(name: str, value: str) -> str:
    """The value of a parameter or tag, masked if its name is secret, else redacted."""
    return MASK if is_secret_name(name) else redacted(value)


def redacted_values(values: Mapping[str, object]) -> dict[str, str]:
    return {name: redacted_value(name, str(value)) for name, value in values.items()}


_PRIVATE_KEY = re.compile(
    r"-----BEGIN (?:[A-Z0-9]+ ){0,4}PRIVATE KEY[^-\n]{0,16}-----(?:.*?-----END [^-\n]*-----|.*)", re.DOTALL
)
# Tokens with a known prefix.
_TOKEN = re.compile(
    r"""(?<![\w-])(?:
        A(?:KIA|SIA|ROA|IDA)[A-Z0-9]{16}(?!\w)
      | gh[pousr]_\w{16,} | github_pat_\w{16,} | gl[a-z]{2,6}-[\w-]{16,} | hf_\w{16,} | npm_\w{16,} | pypi-[\w-]{16,}
      | xox[a-z]-[\w-]{8,} | xapp-[\w-]{8,} | AIza[\w-]{30,} | ya29\.[\w.-]{16,} | dapi[0-9a-f]{32}
      | sk-[\w-]{20,} | [rs]k_(?:live|test)_\w{8,}
      | (?<=hooks\.slack\.com/services/)[\w/-]{8,}
      | eyJ[\w-]{8,}\.[\w-]{4,}\.[\w-]*
    )
    | (?<=(?<!\w)Bearer\ )(?![A-Za-z]?[a-z]{0,18}(?![\w+/=.~-]))[\w+/=.~-]{8,}
    | (?<=(?<!\w)Basic\ )(?![A-Za-z]?[a-z]{0,18}(?![\w+/=.~-]))[\w+/=.~-]{8,}""",
    re.VERBOSE,
)


# --- user info of URLs ------------------------------------------------------------------------------------------------

_RUN = re.compile(r"\S+")
_USER = re.compile(r"(?:[^\s/?#@:'\"]|['\"](?![,;)\]}]|\Z))*")
_PORT = re.compile(r":\d{2,5}(?:['\"](?:[,;)\]}]|\Z)|\Z)")
_QUOTE_AT_END = re.compile(r"['\"](?:[,;)\]}]|\Z)")
_HOST = re.compile(r"[\w.\[\]-]+(?::\w+)?(?:[/?#][^'\"]*)?")
_MAX_QUOTES = 20
_NAMES_A_CONTAINER = ("abfs", "abfss", "wasb", "wasbs")
"""Schemes with a container before the `@`, not a user: abfss://container@account."""
_LOGIN_ALONE = re.compile(r"(?<![\w.:/@-])([\w.-]{1,64}):[^\s@/'\"]{1,256}@(?=[\w.-]{1,255}:\d{1,5}(?!\w))")


def _without_user_info(text: str) -> str:
    if "@" not in text:
        return text
    text = _RUN.sub(lambda run: _run_without_user_info(run.group()), text)
    return _LOGIN_ALONE.sub(rf"\1:{MASK}@", text)


def _run_without_user_info(run: str) -> str:
    """`run`: text without blanks. A password may contain `/ # ? : @` and quotes, which otherwise end a host or a value.
    So it ends at the last `@`, or the last one before a quote that ends a value (`"http://me:pw@host:80","to":"me@x"`).
    """
    parts: list[str] = []
    done = at = 0
    while (slashes := run.find("://", done)) >= 0 and (at := run.find("@", max(at, slashes))) >= 0:
        start = slashes + 3
        parts.append(run[done:start])
        done = start
        user = _USER.match(run, start)
        end = user.end() if user else start
        if start < end == at and not run[max(0, slashes - 5) : slashes].lower().endswith(_NAMES_A_CONTAINER):
            parts.append(MASK)
            done = at
        elif run[end : end + 1] == ":" and not _PORT.match(run, end):
            at = done = _last_at(run, at)
            parts.append(MASK)
    return "".join([*parts, run[done:]])


def _last_at(run: str, first: int) -> int:
    """The position of the `@` before the host: the last, or the last before a quote that ends a value with a host."""
    for quote in islice(_QUOTE_AT_END.finditer(run, first), _MAX_QUOTES):
        at = run.rindex("@", first, quote.start())
        if _HOST.fullmatch(run, at + 1, quote.start()):
            return at
    return run.rindex("@", first)


# --- values under secret names ----------------------------------------------------------------------------------------

_NAME = re.compile(
    r"(?P<before>^[ \t+-]*|[?&;])?(?<![\w.-])-*(?P<name>\w[\w.-]{0,127})(?P<quote>\\?['\"])?"
    r"[ \t]{0,4}(?P<sign>=>|:=|={1,2}|:(?!//))[ \t]{0,4}",
    re.MULTILINE,
)
_QUOTED = re.compile(r"(\\?(['\"]))(?:[^\\\n]|\\.){0,512}?\1(?=[\s,;:)\]}>&]|\Z)")
_END = r"['\"`)\]}>](?:[\s,;:)\]}>&]|\Z)|[,;&](?:\s|\Z|['\"]?[\w.-]{1,64}['\"]?[ ]?[=:])"
_WORDS = re.compile(rf"(?:(?:Bearer|Basic|Digest|Token|Negotiate|ApiKey)[ \t]+)?(?:(?!{_END})\S)+", re.IGNORECASE)
_BLOCK = re.compile(r"[|>][+-]?\d?[ \t]*(?:\n[+-]?[ \t]+.*)+")
_LINE = re.compile(r".+")
_VERSION = re.compile(r"\d+(?:\.\w+)+(?=[\s,;]|\Z)")
"""A package's version: google-auth==2.62.2."""
_NO_VALUE = re.compile(
    r"(?:a|an|and|are|as|be|bool|bytes|cannot|could|disabled|does|enabled|expected|export|false|for|give|has|in|int"
    r"|invalid|is|it|missing|must|needs|no|none|not|null|of|optional|or|refused|required|set|should|str|the|to"
    r"|true|unknown|use|was|will|wrong|(?:basic|token)(?![ \t]+[\w+/=.-]{6}))"
    r"(?=\s|\Z|[.,:;)`'\"]{1,2}(?:\s|\Z))",
    re.IGNORECASE,
)
"""How a sentence, or code, continues after a name without giving its value."""
_OPTION = re.compile(
    rf"((?<![\w-])--?([A-Za-z][\w-]{{0,64}})[ \t]{{1,4}})(?!-)(?!{_NO_VALUE.pattern})"
    r"(?:['\"][^'\"\n]{0,512}['\"](?!\w)|\S+)",
    re.IGNORECASE,
)
_MAPPING = re.compile(r"[{\[]\s*(?:[{\[]|['\"]?[\w.-]{1,64}['\"]?\s*:)")
_ONLY_IN_QUERIES = {"KEY"}
_DOTTED_KEY = re.compile(r"(?:access|account|api|auth|encryption|private|secret|shared)\.key\Z", re.IGNORECASE)
_ABOUT_IT = {"DIR", "FILE", "MODE", "PATH", "REF", "SECONDS", "TYPE"}
"""Last words of names of a secret's location or kind: RAY_AUTH_TOKEN_PATH."""
_EXCEPTION = re.compile(r"[a-z](Error|Exception|Warning)\Z")
_PROSE = {
    "AUTH", "COOKIE", "COOKIES", "CREDENTIALS", "KEYS", "PASS", "PASSWORDS", "PAT", "SAS", "SECRETS", "SIG",
    "SIGNATURE", "TOKEN", "TOKENS",
}  # fmt: skip
"""Names that are also ordinary words: before a colon within a line of prose they are no names."""


def _without_named_values(text: str) -> str:
    parts: list[str] = []
    done = position = 0
    while (found := _NAME.search(text, position)) is not None:
        position = found.end()
        if _names_a_secret(found) and (value := _value(text, found)) is not None:
            parts += [text[done : value[0]], MASK]
            done = position = value[1]
    return _OPTION.sub(_option_without_value, "".join([*parts, text[done:]]))


def _names_a_secret(found: re.Match[str]) -> bool:
    before, whole = found.group("before"), found.group("name")
    name = whole if _DOTTED_KEY.search(whole) else whole.rpartition(".")[2]
    if _EXCEPTION.search(name):  # NoCredentialsError: what follows is its message
        return False
    if name.upper() in _ONLY_IN_QUERIES:
        return before in ("?", "&", ";")
    within_prose = found.group("sign") == ":" and before is None and not found.group("quote")
    return (
        is_secret_name(name)
        and not (within_prose and name.upper() in _PROSE)
        and re.split(r"[_-]", name.upper())[-1] not in _ABOUT_IT
    )


def _value(text: str, found: re.Match[str]) -> tuple[int, int] | None:
    """Start and end of the value after a name, without quotes; None if there is none, or a sentence continues."""
    start = found.end()
    if quoted := _QUOTED.match(text, start):
        num_quotes = len(quoted.group(1))
        return start + num_quotes, quoted.end() - num_quotes
    if _NO_VALUE.match(text, start) or (found.group("sign") == ":" and _MAPPING.match(text, start)):
        return None
    is_yaml = found.group("sign") == ":" and (found.group("before") or "").strip("?&;") == found.group("before")
    if found.group("sign") == "==" and _VERSION.match(text, start):
        return None
    rules = (_BLOCK, _LINE) if is_yaml and not found.group("quote") else (_WORDS, _RUN)
    return next((value.span() for rule in rules if (value := rule.match(text, start))), None)


def _option_without_value(found: re.Match[str]) -> str:
    return found.group(1) + MASK if is_secret_name(found.group(2)) else found.group()
