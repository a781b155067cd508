"""Whether a tracking server answers, asked with short limits before mlflow's long retries can begin."""

from __future__ import annotations

import os
import time
import warnings
from urllib.parse import urlsplit

from data_prep.redaction import redacted
from resnet_dist.errors import Fault, UserError
from resnet_dist.tracking.reasons import first_line, root_reason

# Touches the server's database, which /health does not; any answer to it will do.
_QUESTION = "/api/2.0/mlflow/experiments/get-by-name?experiment_name=Default"
_PAUSE_S = 0.5


class Unanswered(Fault):
    """The server was too slow, away or out of order; the same call may succeed a moment later."""

    def __init__(self, why: str, mend: str = "") -> None:
        super().__init__(f"{why}; {mend}" if mend else why)
        self.why = why


def require_answer(tracking_uri: str, *, limit_s: float = 10.0, attempt_s: float = 3.0) -> None:
    """Returns as soon as the server answers; at once for an URI without a server.

    `attempt_s`: how long it may take at first; twice as long each time that it did not.

    Raises Unanswered after `limit_s` without an answer (down, hung, or a 5xx status), UserError if it refuses the host
    name.
    """
    if not tracking_uri.startswith(("http://", "https://")):
        return
    deadline_s = time.monotonic() + limit_s
    while True:
        left_s = deadline_s - time.monotonic()
        reason = _ask(tracking_uri, timeout_s=max(0.5, min(attempt_s, left_s)))
        if reason is None:
            return
        if deadline_s - time.monotonic() < _PAUSE_S:
            raise Unanswered(
                f"{redacted(tracking_uri)}: the MLflow server does not answer ({reason}, tried for {limit_s:.0f} s)",
                "start it or correct tracking_uri (of the profile, or --tracking-uri), then run the same command again",
            )
        attempt_s *= 2
        time.sleep(_PAUSE_S)


def _ask(tracking_uri: str, timeout_s: float) -> str | None:
    """None if the server answered, else what happened instead. Asked as MLflow does, but without a password."""
    import requests

    parts = urlsplit(tracking_uri)
    address = parts.netloc.rpartition("@")[2]
    url = f"{parts.scheme}://{address}{parts.path.rstrip('/')}{_QUESTION}"
    insecure = os.environ.get("MLFLOW_TRACKING_INSECURE_TLS", "").lower() in ("true", "1")
    verify = False if insecure else os.environ.get("MLFLOW_TRACKING_SERVER_CERT_PATH") or True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that certificates are not looked at was the user's own wish
            answer = requests.get(url, timeout=timeout_s, verify=verify, stream=True)
        with answer:
            if answer.status_code == 403 and b"Invalid Host" in next(answer.iter_content(2000), b""):
                raise UserError(
                    f"{redacted(tracking_uri)}: the MLflow server refuses the host name {address}; "
                    f"start it with --allowed-hosts '{address}'"
                )
            return None if answer.status_code < 500 else f"status {answer.status_code}"
    except requests.exceptions.SSLError as error:
        raise UserError(f"{redacted(tracking_uri)}: {_tls_mistake(root_reason(error))}") from None
    except requests.exceptions.Timeout:
        return "no reply"
    except requests.exceptions.ConnectionError as error:
        return root_reason(error)
    except (requests.exceptions.RequestException, OSError) as error:  # OSError: no such file of certificates
        raise UserError(f"{redacted(tracking_uri)}: the MLflow server cannot be asked: {first_line(error)}") from None


def _tls_mistake(reason: str) -> str:
    """What is wrong with a TLS connection, and what to do about it."""
    _, failed, what = reason.partition("certificate verify failed: ")
    if not failed:
        return f"it does not speak TLS ({reason}); write http:// instead of https://, or another port"
    return (
        f"its certificate is not accepted ({what.partition(' (_ssl')[0]}); export "
        "MLFLOW_TRACKING_SERVER_CERT_PATH=FILE.pem with that of its authority, or correct tracking_uri"
    )
