"""Whether a tracking server answers, asked with short limits before mlflow's long retries can begin."""

from __future__ import annotations

import http.client
import ssl
import time
import urllib.error
import urllib.request
from urllib.parse import urlsplit

from data_prep.redaction import redacted
from resnet_dist.errors import Fault, UserError

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
                "start it or correct tracking_uri in the profile, then run the same command again",
            )
        attempt_s *= 2
        time.sleep(_PAUSE_S)


def _ask(tracking_uri: str, timeout_s: float) -> str | None:
    """None if the server answered, else what happened instead."""
    parts = urlsplit(tracking_uri)
    address = parts.netloc.rpartition("@")[2]
    # No certificate check and no password: this only asks whether somebody is there, and sends nothing.
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    url = f"{parts.scheme}://{address}{parts.path.rstrip('/')}{_QUESTION}"
    try:
        opener = urllib.request.build_opener(urllib.request.HTTPSHandler(context=context))
        with opener.open(url, timeout=timeout_s):
            return None
    except urllib.error.HTTPError as error:
        if error.code == 403 and b"Invalid Host" in error.read(2000):
            raise UserError(
                f"{redacted(tracking_uri)}: the MLflow server refuses the host name {address}; "
                f"start it with --allowed-hosts '{address}'"
            ) from None
        return None if error.code < 500 else f"status {error.code}"
    except TimeoutError:
        return "no reply"
    except urllib.error.URLError as error:
        return "no reply" if isinstance(error.reason, TimeoutError) else str(error.reason)
    except (OSError, http.client.HTTPException) as error:
        return str(error) or type(error).__name__
