"""The addresses of the server."""

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.responses import Response

from launch.serve.engine import print_traceback
from launch.serve.exchange import answer, error_response
from launch.serve.protocol import CHAT, TEXT, ApiError
from launch.serve.service import Service


def create_app(service: Service) -> FastAPI:
    """The HTTP application of a service. Interactive docs are off: they would load scripts from a CDN."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    model = {
        "id": service.name,
        "object": "model",
        "created": service.started,
        "owned_by": "diffllm",
        "max_model_len": service.model.lm.config.max_position_embeddings,
    }

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await answer(service, request, CHAT)

    @app.post("/v1/completions")
    async def complete(request: Request) -> Response:
        return await answer(service, request, TEXT)

    @app.get("/v1/models")
    async def models() -> JSONResponse:
        return JSONResponse({"object": "list", "data": [model]})

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> JSONResponse:
        if name != service.name:
            return error_response(ApiError(404, f"{name}: this server has {service.name}", None, "model_not_found"))
        return JSONResponse(model)

    @app.get("/health")
    async def health() -> JSONResponse:
        alive = service.engine.alive
        return JSONResponse({"status": "ok" if alive else "the sampler has ended"}, 200 if alive else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.exception_handler(HTTPException)
    async def refuse(request: Request, error: HTTPException) -> JSONResponse:
        path = f"{request.method} {request.url.path}"
        return error_response(ApiError(error.status_code, f"{path}: {error.detail}", **(error.headers or {})))

    @app.exception_handler(Exception)
    async def fail(request: Request, error: Exception) -> JSONResponse:
        print_traceback(error)
        return error_response(ApiError(500, "the server failed: its log says why", connection="close"))

    return app
