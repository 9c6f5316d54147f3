"""No credential of any known shape gets past the scrubber; what only resembles one does."""

import json
import time

import pytest

from esper.mesh.scrub import MASK, is_secret_name, scrub, scrub_text


def _join(*parts: str) -> str:
    """Credential shapes are put together here, so that scanners of repositories find none."""
    return "".join(parts)


A = "aB3dE5fG7hJ9kL2mN4pQ6rS8tU1vW3xY5zA7bC9d"
PEM = _join("-----BEGIN RSA PRIV", "ATE KEY-----\nMIIEowIBAAKCAQEA7bq\nQhK3\n-----END RSA PRIV", "ATE KEY-----")
JWT = _join("eyJ", "hbGciOiJIUzI1NiJ9.eyJzdWIiOiJhbGljZSJ9.", A)

# (text, the part that must be gone)
CORPUS = [
    (_join("found AKIA", "IOSFODNN7EXAMPLE in env"), "IOSFODNN7EXAMPLE"),
    (_join("ASIA", "Y34FZKBOKMUTVV7A"), "Y34FZKBOKMUTVV7A"),
    ("aws_secret_access_key = wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY", "wJalr"),
    ("AWS_SESSION_TOKEN=FwoGZXIvYXdzEBYaDH", "FwoGZXIv"),
    (_join("ghp", "_", A[:36]), A[:36]),
    (_join("cloning with gho", "_", A[:36], " failed"), A[:36]),
    (_join("github_pat", "_11ABCDEFG0", A), A),
    (_join("glpat", "-", A[:20]), A[:20]),
    (JWT, "hbGciOiJIUzI1NiJ9"),
    (f"Authorization: Bearer {A}", A),
    (f"authorization=Bearer {A}", A),
    (f"curl -H 'Authorization: Basic {A[:24]}=='", A[:24]),
    (f"bearer {JWT}", "eyJ"),
    ("Proxy-Authorization: Negotiate YIIJvwYGKwYBBQUC", "YIIJvw"),
    ("Cookie: session=8f14e45fceea167a; theme=dark", "8f14e45f"),
    ("Set-Cookie: sid=31d4d96e407aad42; HttpOnly", "31d4d96e"),
    ("postgresql://esper:hunter2@db.internal:5432/urza", "hunter2"),
    ("postgresql+asyncpg://esper:p%40ss:w0rd@db/urza", "p%40ss"),
    ("redis://:hunter2@cache:6379/0", "hunter2"),
    ("https://user:hunter2@example.org/path?x=1", "hunter2"),
    ("amqp://guest:guest-secret@mq//", "guest-secret"),
    ("mongodb+srv://root:hunter2@cluster0.mongodb.net", "hunter2"),
    (_join("https://", A[:32], "@sentry.example.org/42"), A[:32]),
    (PEM, "MIIEowIBAAKCAQEA7bq"),
    (_join("-----BEGIN PRIV", "ATE KEY-----\nMC4CAQAwBQYDK2Vw\nthe end is missing"), "MC4CAQAwBQYDK2Vw"),
    (_join("-----BEGIN OPENSSH PRIV", "ATE KEY-----\\nb3BlbnNzaC1rZXktdjE\\n"), "b3BlbnNzaC1rZXktdjE"),
    (
        _join("-----BEGIN PGP PRIV", "ATE KEY BLOCK-----\n\nlQOYBGPf\n-----END PGP PRIV", "ATE KEY BLOCK-----"),
        "lQOYBGPf",
    ),
    (json.dumps({"type": "service_account", "private_key": PEM, "client_email": "a@b"}), "MIIEowIBAAKCAQEA7bq"),
    (_join("xox", "b-123456789012-", A[:24]), A[:24]),
    (_join("xapp", "-1-A012-", A[:20]), A[:20]),
    (_join("https://hooks.slack", ".com/services/T000/B000/", A[:24]), A[:24]),
    (_join("https://discord", ".com/api/webhooks/1234/", A), A),
    (_join("AIza", A[:35]), A[:35]),
    (_join("ya29", ".", A), A),
    (_join("GOCSPX", "-", A[:28]), A[:28]),
    (_join("sk", "_live_", A[:24]), A[:24]),
    (_join("rk", "_test_", A[:24]), A[:24]),
    (_join("whsec", "_", A[:32]), A[:32]),
    (_join("sk", "-", A), A),
    (_join("sk-ant", "-api03-", A), A),
    (_join("hf", "_", A[:34]), A[:34]),
    (_join("SG", ".", A[:22], ".", A), A[:22]),
    (_join("SK", "0123456789abcdef0123456789abcdef"), "0123456789abcdef"),
    (_join("npm", "_", A[:36]), A[:36]),
    (_join("pypi", "-AgEIcHlwaS5vcmc", A), A),
    (_join("dop", "_v1_", "0123456789abcdef" * 4), "0123456789abcdef"),
    (_join("shpat", "_", "0123456789abcdef" * 2), "0123456789abcdef"),
    (_join("hvs", ".", A), A),
    (_join("dapi", "0123456789abcdef" * 2), "0123456789abcdef"),
    (_join("123456789", ":AA", A[:33]), A[:33]),
    ("DefaultEndpointsProtocol=https;AccountName=esper;AccountKey=Zm9vYmFyYmF6cXV4==;EndpointSuffix=x", "Zm9vYmFy"),
    ("Server=db;Database=urza;User Id=sa;Password=hunter2;Encrypt=true", "hunter2"),
    ("Server=db;Uid=sa;Pwd=hunter2;", "hunter2"),
    ("host=db user=esper password=hunter2 dbname=urza", "hunter2"),
    ("https://store.blob/x?sv=2024&sig=Zm9vYmFyYmF6%3D&se=1", "Zm9vYmFy"),
    ("https://s3/x?X-Amz-Signature=0123456789abcdef&X-Amz-Date=1", "0123456789abcdef"),
    ("password=hunter2", "hunter2"),
    ("password: hunter2", "hunter2"),
    ("DB_PASSWORD='hunter2 with blanks'", "hunter2"),
    ('the body was {"user": "a", "password": "hunter2", "n": 1}', "hunter2"),
    ("{'api_key': 'hunter2'}", "hunter2"),
    (json.dumps(json.dumps({"password": "hunter2"})), "hunter2"),
    ("client_secret=hunter2&grant_type=x", "hunter2"),
    ("x-api-key: hunter2hunter2", "hunter2"),
    ("ESPER_AUTH__SECRET=hunter2 esper up", "hunter2"),
    ("mysqldump --password=hunter2 urza", "hunter2"),
    ("esper login --token hunter2", "hunter2"),
    ("secret => 'hunter2'", "hunter2"),
    ("passphrase := hunter2", "hunter2"),
    ("accessToken=hunter2", "hunter2"),
    ("refresh_token: 'hunter2'", "hunter2"),
    ("signing_key=hunter2", "hunter2"),
    ("sqlalchemy.exc.OperationalError: connect(dsn=postgres://u:hunter2@h/d) refused", "hunter2"),
]

CORPUS += [
    (f"auth={A}", A),
    (json.dumps({"auth": A}), A),
    (f"auth: Basic {A}", A),
    (f"authorization header was Basic {A[:24]}==", A[:24]),
    (f"OPENAI_KEY={A}", A),
    ("api_keys=['hunter2', 'hunter3']", "hunter3"),
    ("credentials={'user': 'a', 'word': 'hunter2'}", "hunter2"),
    ("postgresql://u:pa/ss@db", "pa/ss"),
    ("rejected {b'password': b'hunter2'}", "hunter2"),
    (f"{'app.section.' * 12}password={A}", A),
    (_join("glsa", "_", A), A),
    (_join("tskey", "-auth-", A), A),
]

INNOCENT = [
    "sha256:" + "0123456789abcdef" * 4,
    "digits-20261123-2021-k3f9",
    "123e4567-e89b-12d3-a456-426614174000",
    "kernel published",
    "2026-11-23T20:21:05.123456Z",
    "image:16->32:float32",
    "https://example.org/path?x=1#frag",
    "http://127.0.0.1:7600/metrics",
    "/esper.v1.UrzaService/GetKernel",
    "epoch 3: loss 0.31, accuracy 97.5 %",
    "max_tokens: 512 of 2048",
    "3 keys, 2 sites",
    'File "/srv/esper/tolaria/loop.py", line 7, in step',
    "basic block of layer 3",
    "the token was refused",
    "kernel digest sha256:" + "0123456789abcdef" * 4 + " does not match",
    "digest sha256:0123456789abcdef",
    "basic convolution block",
    "they negotiate parameters",
    "bearer authentication is expected",
    "http://host:8080/path@v2",
    "postgresql://db:5432/urza?options=a@b",
    "author=somebody, conv_keys: 3",
    "connection: closed, session: 3",
]


@pytest.mark.parametrize(("text", "secret"), CORPUS, ids=range(len(CORPUS)))
def test_every_credential_shape_is_scrubbed(text: str, secret: str) -> None:
    """Alone, in a sentence, in JSON, as a nested value: the secret part is gone and the record says so."""
    for wrapped in (text, f"call failed: {text} (gave up)", f"multi\nline\n{text}"):
        assert secret in wrapped
        clean = scrub_text(wrapped)
        assert secret not in clean
        assert MASK in clean
    record = scrub({"event": "x", "nested": [{"deep": {"text": text}}], text: 1})
    assert secret not in repr(record)


@pytest.mark.parametrize("text", INNOCENT)
def test_what_only_resembles_a_credential_stays(text: str) -> None:
    """Digests, ids, addresses and prose pass unharmed: a log that hides everything helps nobody."""
    assert text == scrub_text(text)


@pytest.mark.parametrize(
    "name",
    ["password", "DB_PASSWORD", "db.password", "apiKey", "api-key", "X-Auth-Token", "authorization", "Cookie",
     "clientSecret", "secret", "secrets", "token", "accessToken", "private_key", "signingKey", "aws_secret_access_key",
     "connection_string", "dsn", "credentials", "passwd", "pwd", "session_id", "auth", "jwt", "otp", "passcode",
     "client_key", "service_key", "sessionid", "db_pass", "passwords", "api_keys", "access_tokens", "hmac_key",
     "password2", "auth_header", "OPENAI_KEY", "dbpassword", "set-cookie", "mnemonic", "conn_str", "userAuth"],
)  # fmt: skip
def test_fields_of_secret_names_lose_any_value(name: str) -> None:
    """The name decides, whatever the value looks like, at any depth."""
    assert is_secret_name(name)
    assert {"a": [{name: MASK}]} == scrub({"a": [{name: "plain"}]})
    assert {name: MASK} == scrub({name: ["even", "lists"]})
    assert MASK == scrub({name.encode(): "plain"})[str(name.encode())]
    for text in (f"{name}={A}", f"{name}: {A}", f"{name} => '{A}'", json.dumps({name: A}), f"run --{name} {A} now"):
        assert A not in scrub_text(f"call failed: {text} (gave up)"), (
            "a name is as secret in a text as it is as a field"
        )


@pytest.mark.parametrize(
    "name",
    [
        "key",
        "site_key",
        "event",
        "tokens",
        "kernel_id",
        "author",
        "topic",
        "passed",
        "tokenizer",
        "valid_tokens",
        "max_tokens",
        "keys",
        "pass_1",
        "partition_key",
        "oauthor",
    ],
)
def test_fields_of_other_names_keep_their_value(name: str) -> None:
    """A message's key and a count of tokens are no secrets."""
    assert {name: "plain"} == scrub({name: "plain"})


def test_absence_of_a_secret_may_be_seen() -> None:
    """None and booleans under a secret name tell nothing but presence."""
    assert {"token": None, "password": True} == scrub({"token": None, "password": True})


def test_what_is_too_deep_to_look_at_is_not_logged() -> None:
    """Nesting has a bound, beyond which the value is cut off."""
    value: object = "password=hunter2"
    for _ in range(50):
        value = [value]
    assert "hunter2" not in repr(scrub(value))
    assert "too deep" in repr(scrub(value))


@pytest.mark.parametrize(
    "unit",
    ["a", "eyJ", "://", "x://a", "password", "-", "sk-", "AC0", "-----BEGIN PRIV" + "ATE KEY-----", "a=", '\\"', "A."],
)
def test_no_text_makes_the_scrubber_slow(unit: str) -> None:
    """Repetition of any fragment costs time in proportion: a hostile string cannot stall the writer."""
    text = unit * (32_768 // len(unit))
    began = time.perf_counter()
    scrub_text(text)
    assert time.perf_counter() - began < 2
