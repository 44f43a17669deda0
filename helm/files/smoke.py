"""What `helm test` runs: the service is ready, and answers a caller that has the token. It takes no decision."""

import json
import os
import urllib.error
import urllib.request

url = os.environ["TARGET_URL"]
token = os.environ.get("TARGET_TOKEN")

with urllib.request.urlopen(f"{url}/health/ready", timeout=10) as answer:
    print("ready:", answer.read().decode())

request = urllib.request.Request(f"{url}/v1/act", data=b"{}", headers={"Content-Type": "application/json"})
if token:
    request.add_header("Authorization", f"Bearer {token}")
try:
    with urllib.request.urlopen(request, timeout=10):
        raise SystemExit("/v1/act answered a request without a state")
except urllib.error.HTTPError as error:
    problem = json.loads(error.read())
    print("act:", error.code, problem)
    if (error.code, problem.get("code")) != (422, "missing_field"):
        raise SystemExit("/v1/act does not answer as it should") from None
