"""An OpenAI-compatible server for a diffusion language model.

  python -m launch.serve model.path=outputs/quickstart/hf
  python -m launch.serve model.path=M sampling=fast sampling.batch_size=64 launch.port=8001

It takes the settings of sample.py for `model` and `sampling`, and launch.host, launch.port, launch.queue,
launch.timeout, launch.shutdown and launch.max_body; launch/README.md explains them.

POST /v1/chat/completions and /v1/completions, GET /v1/models, /health and /metrics. SIGTERM or SIGINT ends the server
with exit code 0 when the running requests are answered.
"""

import sys

from launch.cli import quiet_libraries, user_errors

try:
    from launch.serve.server import serve
except ImportError as error:
    if error.name not in ("fastapi", "uvicorn", "prometheus_client", "starlette", "pydantic"):
        raise
    sys.exit(f"error: launch.serve needs {error.name}: pip install 'diffllm[serve]'")

if __name__ == "__main__":
    with user_errors(debug=False):
        if {"-h", "--help"} & set(sys.argv[1:]):
            sys.exit(print(__doc__))
        quiet_libraries()
        serve(sys.argv[1:])
