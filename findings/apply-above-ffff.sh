#!/usr/bin/env bash
# A server-side apply through Kubernetes' official asyncio client cannot hold a character above U+FFFF. The client writes
# every body with json.dumps, in ASCII, so such a character is a pair of escapes (\ud83d\ude00). That is JSON, but an
# apply (application/apply-patch+yaml) is read as YAML by the API server (sigs.k8s.io/yaml, whose scanner is libyaml's
# translated to Go), where each half is an invalid escape: 400 "found invalid Unicode character escape code". A merge
# patch with the same text is taken.
# Exits 0 while the client writes so and libyaml refuses it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check kubernetes==37.0.1 aiohttp==3.14.5 PyYAML==6.0.3 2>/dev/null
"$folder/venv/bin/python" - <<'PYTHON'
import asyncio
import importlib.metadata
import json

import yaml
from aiohttp import web
from kubernetes.aio.client import ApiClient, Configuration, CoreV1Api

sent: dict[str, str] = {}


async def keep(request: web.Request) -> web.Response:
    sent[request.content_type] = await request.text()
    return web.json_response({})


async def main() -> None:
    app = web.Application()
    app.router.add_patch("/{path:.*}", keep)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    body = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "a"}, "data": {"text": "\U0001f600"}}
    async with ApiClient(Configuration(host=f"http://127.0.0.1:{port}")) as client:
        for content_type in ("application/apply-patch+yaml", "application/merge-patch+json"):
            await CoreV1Api(client).patch_namespaced_config_map(
                "a", "default", body, field_manager="me", _content_type=content_type
            )
    await runner.cleanup()


asyncio.run(main())
for name in ("kubernetes", "aiohttp", "PyYAML"):
    print(name, importlib.metadata.version(name))
applied = sent["application/apply-patch+yaml"]
print("the body of the apply:", applied)
assert r"\ud83d\ude00" in applied, "the client writes it otherwise now"
try:
    yaml.load(applied, Loader=yaml.CSafeLoader)
except yaml.YAMLError as error:
    print("libyaml:", str(error).replace("\n", " "))
    assert "invalid Unicode character escape code" in str(error)
else:
    raise SystemExit("libyaml takes it now")
raw = json.dumps(json.loads(applied), ensure_ascii=False)
print("as UTF-8 libyaml reads:", ascii(yaml.load(raw, Loader=yaml.CSafeLoader)["data"]))
PYTHON
