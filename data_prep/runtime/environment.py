"""The environment of a command, corrected once, before anything else reads it.

Empty, quoted or relative values become what was meant; a value that would crash a library, or make it fail without a
readable message, is an error that names the variable. Imports no libraries: this runs before they are imported.
"""

from __future__ import annotations

import os
import pwd
import re
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from data_prep.errors import UserError
from data_prep.runtime.import_path import CODE_ROOT, hiding, hiding_mistake, is_for_packages

Environment = Mapping[str, str]
_ADDRESSES = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")
_EMPTY_IS_UNSET = (
    *(*_ADDRESSES, "RAY_TMPDIR", "RAY_NAMESPACE", "RAY_REDIS_ADDRESS"),
    *("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"),
)
_NUMBERS_OF_THREADS = (
    *("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS", "NUMBA_NUM_THREADS"),
)
_PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
_NO_PROXIES = ("no_proxy", "NO_PROXY")
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_RAY_SETTING = re.compile(r"RAY_[a-z]\w*")
"""Variables that Ray's C++ parses; it crashes on an invalid value."""
_PLAIN = re.compile(r"[+-]?\d+(\.\d*)?(e[+-]?\d+)?|true|false", re.IGNORECASE)
_PROBE_LIMIT_S = 60.0


@dataclass(frozen=True)
class Machine:
    """What `corrected` needs to know about the machine and the process."""

    folder: str
    """Where the command was started."""
    home: str
    """The user's home according to the system; "" if there is none."""
    has_user_name: bool
    """Whether the system has a name for the user."""
    encoding: str
    """Encoding of file names."""
    code: str = ""
    """The folder of our packages, for processes that start elsewhere; "" if they are installed."""
    names: tuple[str, ...] = ()
    """The machine's host name and addresses."""
    temporary: str = "/tmp"
    """Where a home can be created if there is none."""
    unusable: Callable[[str], str] = lambda folder: ""
    """See `unusable` below."""
    hiding: Callable[[str], Sequence[str]] = lambda folder: ()
    """The files in a folder of PYTHONPATH that hide other modules."""
    crashes_ray: Callable[[Environment], bool] = lambda settings: False
    """Whether Ray cannot read these variables."""


@dataclass(frozen=True)
class Corrected:
    environment: dict[str, str]
    notes: list[str] = field(default_factory=list)
    """Changes that the user should know of."""
    mistakes: list[str] = field(default_factory=list)
    """The user's mistakes: nothing may start."""

    def set(self, key: str, value: str | None) -> None:
        """None: unset it."""
        if value is None:
            self.environment.pop(key, None)
        else:
            self.environment[key] = value


def corrected(environment: Environment, machine: Machine) -> Corrected:
    """The environment as it was meant. Pure, except for the callables of `machine`."""
    found = Corrected(dict(environment))
    for correct in (_values, _temporary_folder, _user, _threads, _modules, _ray_settings, _encoding):
        correct(found, machine)
    now = found.environment
    clusters = [now[key] for key in _ADDRESSES if key in now and bypasses_proxy(now[key])]
    now.update(without_proxy(now, [*machine.names, *map(_host, clusters)]))
    return found


def cleaned(value: str) -> str:
    """The value without surrounding blanks and the quotes that env files and YAML leave."""
    value = value.strip()
    while len(value) >= 2 and value[0] == value[-1] and value[0] in "'\"":
        value = value[1:-1].strip()
    return value


def cluster_address(value: str | None, source: str) -> str | None:
    """`host:port` of a cluster, `ray://host:port` of its client server, `auto`, or None: a local Ray. `source`: where
    `value` comes from, RAY_ADDRESS for example.

    Raises UserError for any other address.
    """
    address = cleaned(value or "").rstrip("/")
    if not address or address.lower() == "local":
        return None
    if address.lower() == "auto":
        return "auto"
    scheme, separator, rest = address.partition("://")
    host, port = _host_and_port(rest if separator else address)
    if separator and scheme.lower() in ("http", "https"):
        raise UserError(
            f"{source}={address}: is a dashboard, which takes jobs; give {host or 'HEAD'}:6379, the port of `ray start "
            "--head`, or send the command there as a job: resnet-dist submit"
        )
    is_client = scheme.lower() == "ray"
    is_host = bool(re.fullmatch(r"[\w.:%-]+", host)) and (port is None or 0 < port < 65536)
    if (separator and not is_client) or not is_host:
        raise UserError(f"{source}={address}: is not the address of a Ray cluster; give HEAD:6379, auto or local")
    place = f"[{host}]" if ":" in host else host
    return f"ray://{place}:{port or 10001}" if is_client else f"{place}:{port or 6379}"


def given_address(of_profile: str | None, environment: Environment) -> tuple[str | None, str]:
    """The address of a cluster from the profile or RAY_ADDRESS, and where it comes from."""
    return (of_profile, "the profile's ray_address") if of_profile else (environment.get("RAY_ADDRESS"), "RAY_ADDRESS")


def without_proxy(environment: Environment, hosts: Sequence[str]) -> dict[str, str]:
    """Changes with which no proxy is used for `hosts` or within this machine.

    `requests` reads the lower-case variable first, gRPC and curl read both.
    """
    if not any(environment.get(key) or environment.get(key.lower()) for key in _PROXIES):
        return {}
    known = [word.strip() for key in _NO_PROXIES for word in environment.get(key, "").split(",")]
    if "*" in known:
        return {}
    words = list(dict.fromkeys(word for word in (*known, *_LOOPBACK, *hosts) if word))
    return {key: ",".join(words) for key in _NO_PROXIES}


def bypasses_proxy(url: str) -> bool:
    """Whether a cluster's URL is reached directly despite proxies: a private network, or no TLS."""
    host = urlsplit(url).hostname or ""
    return not url.startswith("https://") or "." not in host or bool(re.fullmatch(r"[\d.]+|.*:.*", host))


def blamed(error: BaseException, environment: Environment) -> str | None:
    """A message that names the variable of Ray or a numerical library whose value `error` quotes, if there is one."""
    for key, value in sorted(environment.items()):
        if key.startswith(("RAY_", "OMP_", "MKL_", "NUMBA_", "TORCH_", "CUDA_", "TUNE_")) and repr(value) in str(error):
            return f"{key}={value}: cannot be read ({error}); correct it or unset it"
    return None


def correct_environment(command: str, environment: MutableMapping[str, str] = os.environ) -> None:
    """Corrects `environment` in place and prints the notes. UserError with all mistakes."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a name that the terminal cannot encode is no error
    found = corrected(environment, this_machine())
    for key in {*environment, *found.environment}:
        if key not in found.environment:
            del environment[key]
        elif environment.get(key) != found.environment[key]:
            environment[key] = found.environment[key]
    for note in found.notes:
        print(f"{command}: note: {note}", file=sys.stderr)
    if found.mistakes:
        raise UserError("; ".join(found.mistakes))


def this_machine() -> Machine:
    try:
        user = pwd.getpwuid(os.getuid())
        home, has_name = user.pw_dir, True
    except KeyError:  # a container's user that is a number only
        home, has_name = "", False
    return Machine(
        folder=_current_folder(),
        home=home if Path(home or "/nowhere").is_dir() else "",
        has_user_name=has_name,
        encoding=sys.getfilesystemencoding(),
        code="" if is_for_packages(CODE_ROOT) else CODE_ROOT,
        names=_names_of_this_machine() if any(os.environ.get(k) or os.environ.get(k.lower()) for k in _PROXIES) else (),
        temporary=tempfile.gettempdir(),
        unusable=unusable,
        hiding=lambda folder: list(hiding(folder, sys.path)),
        crashes_ray=_crashes_ray,
    )


def _current_folder() -> str:
    try:
        return str(Path.cwd())
    except OSError:
        raise UserError("the folder in which this command was started is gone; change to another") from None


def unusable(folder: str) -> str:
    """Why nothing can be written into `folder`; "" if it can."""
    if not Path(folder).is_dir():
        return "is not a folder" if Path(folder).exists() else "does not exist"
    try:
        with tempfile.TemporaryFile(dir=folder):
            return ""
    except OSError as error:
        return (error.strerror or str(error)).lower()


def private_folder(base: str) -> Path | None:
    """A folder below `base` that only this user can enter, the same at every call; None if it cannot be made."""
    path = Path(base) / f"ray-{os.getuid()}"
    try:
        if _is_private(Path(base)):
            return Path(base)  # `base` is a result of an earlier call
        path.mkdir(mode=0o700, exist_ok=True)
        if path.is_symlink() or path.stat().st_uid != os.getuid():
            return Path(tempfile.mkdtemp(prefix="ray-", dir=base))  # someone else took the name
        path.chmod(0o700)
    except OSError:
        return None
    return path


def _is_private(folder: Path) -> bool:
    status = folder.lstat()
    return folder.name.startswith("ray-") and status.st_uid == os.getuid() and not status.st_mode & 0o077


def _values(found: Corrected, machine: Machine) -> None:
    for key, value in list(found.environment.items()):
        if key in _EMPTY_IS_UNSET or _RAY_SETTING.fullmatch(key):
            found.set(key, cleaned(value) or None)
    mode = found.environment.get("RAY_AUTH_MODE", "disabled")
    if mode.lower() not in ("token", "disabled"):
        found.mistakes.append(f"RAY_AUTH_MODE={mode}: is neither token nor disabled")


def _temporary_folder(found: Corrected, machine: Machine) -> None:
    """A missing folder is a leftover of a job or a mount. Python ignores it, other libraries do not."""
    given = found.environment.get("TMPDIR", "")
    folder = str(Path(machine.folder) / cleaned(given)) if cleaned(given) else ""
    problem = machine.unusable(folder) if folder else ""
    if problem:
        found.notes.append(f"TMPDIR={given}: {problem}; temporary files go to {machine.temporary}")
    found.set("TMPDIR", folder if folder and not problem else None)


def _user(found: Corrected, machine: Machine) -> None:
    home = found.environment.get("HOME", "")
    if not home or not Path(home).is_dir():
        usable = machine.home or str(private_folder(machine.temporary) or machine.temporary)
        found.set("HOME", usable)
        if home:
            found.notes.append(f"HOME={home}: is not a folder; {usable} is used")
    has_name = any(found.environment.get(key) for key in ("LOGNAME", "USER", "LNAME", "USERNAME"))
    if not machine.has_user_name and not has_name:  # getpass.getuser would fail
        found.environment.update(dict.fromkeys(("LOGNAME", "USER"), f"uid-{os.getuid()}"))


def _threads(found: Corrected, machine: Machine) -> None:
    for key in _NUMBERS_OF_THREADS:
        value = cleaned(found.environment.get(key, ""))
        found.set(key, value or None)
        pattern = r"[1-9]\d{0,5}( *, *[1-9]\d{0,5})*" if key == "OMP_NUM_THREADS" else r"[1-9]\d{0,5}"
        if value and not re.fullmatch(pattern, value):
            found.mistakes.append(f"{key}={value}: is not a number of threads; give 1, 2, ... or unset it")


def _modules(found: Corrected, machine: Machine) -> None:
    """PYTHONPATH for child processes. An empty entry in it would be the folder in which each of them starts."""
    given = found.environment.get("PYTHONPATH", "")
    entries = [str(Path(machine.folder) / entry.strip()) for entry in given.split(os.pathsep) if entry.strip()]
    folders = list(dict.fromkeys([*entries, *([machine.code] if machine.code else [])]))
    found.set("PYTHONPATH", os.pathsep.join(folders) or None)
    found.set("PYTHONSAFEPATH", "1")
    found.mistakes.extend(filter(None, (hiding_mistake(folder, list(machine.hiding(folder))) for folder in folders)))


def _ray_settings(found: Corrected, machine: Machine) -> None:
    """Ray exits without an error message if a value is not a number."""
    values = found.environment
    doubtful = {k: v for k, v in values.items() if _RAY_SETTING.fullmatch(k) and not _PLAIN.fullmatch(v)}
    if doubtful and machine.crashes_ray(doubtful):
        guilty = [k for k in doubtful if len(doubtful) == 1 or machine.crashes_ray({k: doubtful[k]})] or list(doubtful)
        named = ", ".join(f"{key}={values[key]}" for key in guilty)
        found.mistakes.append(f"{named}: cannot be read by Ray, which needs a number; correct it or unset it")


def _encoding(found: Corrected, machine: Machine) -> None:
    if machine.encoding.lower().replace("-", "") == "utf8":
        return
    key = next((key for key in ("LC_ALL", "LC_CTYPE", "LANG") if found.environment.get(key)), "LC_ALL")
    found.mistakes.append(
        f"{key}={found.environment.get(key, '')}: file names would be read as {machine.encoding}, and classes named "
        "after them would differ from those elsewhere; set PYTHONUTF8=1, or LC_ALL=C.UTF-8"
    )


def _host(address: str) -> str:
    return _host_and_port(address.partition("://")[2] or address)[0]


def _host_and_port(address: str) -> tuple[str, int | None]:
    """Host and port of `head:6379/x`, `[::1]:6379`, `::1`, `head`: None without a port, -1 for an invalid one."""
    address = address.partition("/")[0]
    if address.startswith("["):
        host, bracket, rest = address[1:].partition("]")
        port = rest.removeprefix(":") if bracket and rest[:1] in ("", ":") else "?"
    elif address.count(":") > 1:
        return address, None
    else:
        host, colon, port = address.partition(":")
        port = port if colon else ""
    if not port:
        return host, None
    return host, int(port) if re.fullmatch(r"[0-9]{1,5}", port) else -1


def _names_of_this_machine() -> tuple[str, ...]:
    name = socket.gethostname()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing, but selects the route and so the address
            return name, str(probe.getsockname()[0])
        except OSError:
            return (name,)


def _crashes_ray(settings: Environment) -> bool:
    rest = {key: value for key, value in os.environ.items() if not _RAY_SETTING.fullmatch(key)}
    command = [sys.executable, "-P", "-c", "import ray._raylet"]
    try:
        done = subprocess.run(command, env={**rest, **settings}, capture_output=True, timeout=_PROBE_LIMIT_S)
    except (OSError, subprocess.SubprocessError):
        return False
    return done.returncode < 0
