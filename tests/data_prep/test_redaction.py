"""Secrets of every known form are removed; text without secrets is unchanged."""

from __future__ import annotations

import json
import string
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.redaction import holds_secret, is_secret_file, is_secret_name, redacted, redacted_values

ROOT = Path(__file__).parents[2]
NAMES = [
    "GITHUB_PAT", "SMTP_PWD", "DB_PASS", "SSH_PASSPHRASE", "AZURE_STORAGE_CONNECTION_STRING", "NPM_AUTH",
    "DATABASE_URL", "MY_DATABASE_URL", "SENTRY_DSN", "AWS_SECRET_ACCESS_KEY", "aws_access_key_id", "WANDB_API_KEY",
    "HF_TOKEN", "MYTOKEN", "MLFLOW_TRACKING_PASSWORD", "HF_PASSWD", "GOOGLE_APPLICATION_CREDENTIALS",
    "clientSecret", "accessKey", "x-api-key", "SharedAccessKey", "AccountKey", "AUTHORIZATION", "SESSION_COOKIE",
    "API_TOKENS", "PRIVATE_KEY",
]  # fmt: skip
HARMLESS_NAMES = [
    "OMP_NUM_THREADS", "NCCL_SOCKET_IFNAME", "PATH", "PWD", "TOKENIZERS_PARALLELISM", "MAX_TOKENS", "num_tokens",
    "AUTHOR", "GIT_AUTHOR_NAME", "MONKEY", "KEYBOARD", "BYPASS", "COMPASS", "PATTERN", "RAY_AUTH_MODE",
    "SSH_AUTH_SOCK", "optim.lr", "model.name", "data.dataset", "PASSES", "SIGNAL", "CUDA_VISIBLE_DEVICES",
    "MLFLOW_TRACKING_URI", "sort_key",
]  # fmt: skip
FILES = [
    ".env", ".env.local", "deploy/prod.env", "a/server.pem", "tls.KEY", "cert.p12", "x.pfx", "id_rsa", "id_ed25519",
    "my_secrets.yaml", "credentials", "credentials.json", ".netrc", ".npmrc", ".pypirc", ".pgpass", "kubeconfig",
    ".git-credentials", "service-account-7.json", ".aws/config", ".ssh/config", "passwords.txt", "a\\b\\.env",
]  # fmt: skip
secret = st.text(string.ascii_letters + string.digits + "/#?'\"@:", max_size=12).map(lambda tail: f"s3cr3t{tail}x")
word = st.from_regex(r"[A-Za-z0-9_~!$*+=%-][A-Za-z0-9_.~!$*+=%-]{5,20}", fullmatch=True).map(
    lambda tail: f"s3cr3t{tail}"
)


@pytest.mark.parametrize("name", [*NAMES, *HARMLESS_NAMES])
def test_names_of_secrets(name: str) -> None:
    assert is_secret_name(name) == (name in NAMES)
    shown = "***" if name in NAMES else "hunter2"
    assert redacted_values({name: "hunter2", "profile.workers": 2}) == {name: shown, "profile.workers": "2"}


@pytest.mark.parametrize("path", FILES)
def test_files_of_secrets(path: str) -> None:
    assert is_secret_file(path)


def test_no_code_of_the_project_counts_as_a_secret() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    found = [path for path in listed.stdout.split() if is_secret_file(path)]
    assert [path for path in found if not path.startswith("cluster/")] == []


@given(user=word, password=secret, before=st.text(max_size=20), after=st.text(max_size=20))
@settings(max_examples=200, deadline=None)
def test_a_password_in_a_url_whatever_it_holds(user: str, password: str, before: str, after: str) -> None:
    text = redacted(f"{before} postgresql+psycopg2://{user}:{password}@host:5432/path {after}")
    assert password not in text
    assert "://***@host:5432/path " in text


@pytest.mark.parametrize("password", ["1/x", "80?", "5'x", "a\"b'c", "@@", ":", "://", "x#y@z", "80#/", '@",x', "')a"])
def test_passwords_that_look_like_the_rest_of_a_url(password: str) -> None:
    assert redacted(f"at http://me:{password}@host/x: refused") == "at http://***@host/x: refused"


SHAPES = [
    "https://host/p?{name}={value}&step=3",
    "https://host/p?step=3&{name}={value}",
    "https://host/p;{name}={value}",
    "https://host/#{name}={value}",
    "export {name}={value}",
    "{name}='{value}'",
    "{name}=={value}",
    "{name}=''{value}",
    "--{name} {value} --next",
    "--{name}={value}",
    "{name}: {value}",
    "  - {name}: '{value}'",
    "+  {name}: {value}  # a comment",
    '{{"{name}": "{value}", "next": 1}}',
    '{{"{name}":"{value}","next":1}}',
    "p.yaml: not valid YAML: while scanning a scalar {name}: {value} ^",
    "Host=db;{name}={value};Port=5432",
    "{{{name}: {value}, OMP_NUM_THREADS: 1}}",
    "{name}: |\n    {value}\nnext: 1",
    "f({name}='{value}', step=3)",
]


@pytest.mark.parametrize("shape", SHAPES)
@given(name=st.sampled_from(NAMES), value=word)
@settings(max_examples=25, deadline=None)
def test_values_under_secret_names(shape: str, name: str, value: str) -> None:
    text = shape.format(name=name, value=value)
    assert value not in redacted(text)
    assert redacted(redacted(text)) == redacted(text)


@pytest.mark.parametrize(
    "query", ["?auth=", "?pass=", ";token=", "&sig=", "?key=", "?X-Amz-Signature=", "#access_token="]
)
def test_queries(query: str) -> None:
    assert redacted(f"s3://bucket/file{query}abc%2Fdef see there") == f"s3://bucket/file{query}*** see there"


@pytest.mark.parametrize(
    "token",
    [
        "AKIA" + "IOSFODNN7EXAMPLE", "ASIA" + "IOSFODNN7EXAMPLE", "ghp_" + "a1B2" * 9, "gho_" + "a1B2" * 9,
        "github_pat_" + "a1B2" * 9, "hf_" + "a1B2" * 9, "glpat-" + "a1B2" * 5, "xoxb-" + "123456789-abcdef",
        "AIza" + "a1B2-" * 7, "sk-" + "a1B2" * 6, "npm_" + "a1B2" * 9, "dapi" + "0a" * 16,
        "eyJ" + "hbGciOiJI.eyJzdWIiOiIx.abc-_",
    ],
)  # fmt: skip
def test_tokens_known_by_their_beginning(token: str) -> None:
    assert redacted(f"status 401: {token} is unknown") == "status 401: *** is unknown"
    assert redacted(f'"{token}"') == '"***"'


@pytest.mark.parametrize("scheme", ["Bearer", "Basic"])
def test_headers(scheme: str) -> None:
    assert "dXNlcjpwYXNz" not in redacted(f"sent {scheme} dXNlcjpwYXNz")
    assert redacted(f"{{'Authorization': '{scheme} dXNlcjpwYXNz'}}") == "{'Authorization': '***'}"
    assert redacted(f"> Authorization: {scheme} dXNlcjpwYXNz\n> Host: h") == "> Authorization: ***\n> Host: h"


@pytest.mark.parametrize("kind", ["RSA PRIVATE KEY", "PRIVATE KEY", "OPENSSH PRIVATE KEY", "PGP PRIVATE KEY BLOCK"])
def test_private_keys_also_cut_off_and_in_a_diff(kind: str) -> None:
    begin, end = f"-----BEGIN {kind}-----", f"-----END {kind}-----"
    assert redacted(f"a\n{begin}\nMIIE\n{end}\nb") == "a\n[private key ***]\nb"
    assert redacted(f"+a\n+{begin}\n+MIIE\n") == "+a\n+[private key ***]"


@pytest.mark.parametrize(
    "text",
    [
        "http://mlflow:5000/a?step=3", "sqlite:////var/a@b.db", "loss = 0.5 @ step 3", "a@b.org", "s3://bucket/x@y",
        "abfss://container@account.dfs.core.windows.net/path", "hf://datasets/me/set@main/x.parquet", "mailto:me@b.org",
        "git@github.com:me/repo.git", "models:/digits@champion", "xxh3:0123456789abcdef", "sha256:9f86d081884c7d65",
        "4b0225d0123456789abcdef0123456789abcdef0", "2026-11-30T10:07:00Z", "1e-4",
        "registry:5000/image:tag@sha256:9f86d0",
        '{"uri":"http://mlflow:5000","mail":"me@b.org"}', "--set optim.lr=0.1", "expected key.path=value",
        "token: expected a word", "AWS_SECRET_ACCESS_KEY is a secret; give it to the nodes' own environment",
        "AWS_SECRET_ACCESS_KEY: is missing",
        "export MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN",
        "export RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH=FILE with the cluster's token",
        "Basic authentication is off", "NoCredentialsError: Unable to locate credentials",
        "botocore.exceptions.TokenRetrievalError: Error when retrieving token from sso",
        "google.auth.exceptions.DefaultCredentialsError: Your default credentials were not found",
        "credentials, endpoint: come from the environment", "without secrets: what a server has to say",
        "not sent (named as secrets are): keys/server.pem",
        '{"key": "optim.lr", "first": "0.1"}', "#/experiments/3/runs?viewStateShareKey=abc", "google-auth==2.62.2",
        "-----BEGIN CERTIFICATE-----\nMIID\n-----END CERTIFICATE-----", "password=***", "http://***@host", "", "://@", "a://b:",
    ],
)  # fmt: skip
def test_text_without_secrets_is_unchanged(text: str) -> None:
    assert redacted(text) == text
    assert not holds_secret(text)


def test_every_recipe_profile_and_space_of_the_project_is_unchanged() -> None:
    for folder in ("resnet_dist/recipes", "cluster/profiles", "tune_spaces"):
        for path in (ROOT / folder).glob("*.yaml"):
            text = path.read_text()
            assert redacted(text) == text
            tree = yaml.safe_load(text)
            assert redacted(json.dumps(tree)) == json.dumps(tree)


@given(
    st.lists(
        st.sampled_from(
            ["://", "@", ":", "u", "token", "=", "'", '"', " ", "\n", "?", ";", "&", "Bearer ", "***", "|", ","]
        )
    ).map("".join)
)
@settings(max_examples=200, deadline=None)
def test_redacted_text_is_unchanged_by_redaction(text: str) -> None:
    once = redacted(text)
    assert redacted(once) == once


@pytest.mark.parametrize(
    "piece",
    ["a", "://", "http://a:", "://a:1@", "@", "token=\"x ", "token=", "token:", "a-", "-", "?key=", "eyJ", "Bearer ",
     "' ",     "-----BEGIN " "PRIVATE KEY-----", "{", "a.b:", "\n ", "x:y@"],
)  # fmt: skip
def test_the_time_grows_with_the_length_only(piece: str) -> None:
    """Twice the text takes far less than four times as long, for the worst texts that we know."""

    def seconds(num_bytes: int) -> float:
        text = piece * (num_bytes // len(piece))
        began = time.process_time()
        redacted(text)
        return time.process_time() - began

    assert seconds(100_000) < 12 * seconds(25_000) + 0.2


def test_the_last_line_of_a_command_passes_it(tmp_path: Path) -> None:
    profile = tmp_path / "p.yaml"
    profile.write_text("workers: 1\n  MY_TOKEN: 'hunter2secret\n")
    done = subprocess.run(
        [sys.executable, "-m", "resnet_dist", "train", "r.yaml", "--on", str(profile), "--json"],
        capture_output=True, text=True, cwd=ROOT, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2
    assert "hunter2secret" not in done.stderr + done.stdout
