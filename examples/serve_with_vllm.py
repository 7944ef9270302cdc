"""Serve a folded model with vLLM, and ask it through OpenAI's client. Needs pip install 'kvfold[vllm]' openai.

python examples/serve_with_vllm.py FOLDED [PORT]      FOLDED: what kvfold compress MODEL --runtime vllm wrote
"""

import subprocess
import sys
import time
import urllib.request

from openai import OpenAI

folder, port = sys.argv[1], int([*sys.argv[2:], 8000][0])
# what `vllm serve FOLDED` runs
command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", folder, "--port", str(port)]
server = subprocess.Popen([*command, "--max-model-len", "256"])
try:
    while True:  # it loads, compiles and says when it is ready
        if server.poll() is not None:
            raise SystemExit(f"the server ended with {server.returncode}")
        try:
            urllib.request.urlopen(f"http://localhost:{port}/health", timeout=1).close()
            break
        except OSError:
            time.sleep(1)
    client = OpenAI(base_url=f"http://localhost:{port}/v1", api_key="none")
    answer = client.completions.create(
        model=folder, prompt="The old man looked at the sea and", max_tokens=16, temperature=0
    )
    print(answer.choices[0].text)
finally:
    server.terminate()
    server.wait()
