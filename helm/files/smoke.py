"""What `helm test` runs: the service is ready, and answers a caller that has the token. It takes no decision."""

# ruff: noqa: S310, T201  The chart sets the address, and the log is what `helm test --logs` shows.
import json
import os
import ssl
import urllib.error
import urllib.request

AUTHORITY = "/etc/surefoot/authority/ca.crt"
CALLER = "/etc/surefoot/caller/tls.crt", "/etc/surefoot/caller/tls.key"


class Named(ssl.SSLContext):
    """Checks that the certificate is of TARGET_NAME, which need not be the name that leads to the Service."""

    def wrap_socket(self, sock, *, server_hostname=None, **options):
        return super().wrap_socket(sock, server_hostname=os.environ.get("TARGET_NAME", server_hostname), **options)


context = Named(ssl.PROTOCOL_TLS_CLIENT)
context.load_default_certs()
if os.path.exists(AUTHORITY):
    context.load_verify_locations(AUTHORITY)
if os.path.exists(CALLER[0]):
    context.load_cert_chain(*CALLER)


def ask(path, body=None, headers=None):
    """Ask, and return the status and the JSON of the answer, whatever it says."""
    request = urllib.request.Request(os.environ["TARGET_URL"] + path, data=body, headers=headers or {})
    try:
        with urllib.request.urlopen(request, timeout=10, context=context) as answer:
            status, text = answer.status, answer.read()
    except urllib.error.HTTPError as error:
        status, text = error.code, error.read()
    print(path, status, text.decode())
    return status, json.loads(text)


if ask("/health/ready")[0] != 200:
    raise SystemExit("the service is not ready")
token = os.environ.get("TARGET_TOKEN")
headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
status, problem = ask("/v1/act", b"{}", headers)
if (status, problem.get("code")) != (422, "missing_field"):
    raise SystemExit("/v1/act does not answer as it should")
