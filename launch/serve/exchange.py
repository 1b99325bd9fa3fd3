"""Answer one request: read its body, sample, and write the response or the parts of a stream."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.requests import ClientDisconnect
from starlette.responses import Response as HTTPResponse
from starlette.types import Receive, Scope, Send

from diffllm.generate import Response, response_of
from launch.serve.engine import EngineEndedError, Job, QueueFullError
from launch.serve.forming import FinalText, draft
from launch.serve.protocol import ApiError, Endpoint, parse_body, read_query, setting_error
from launch.serve.replies import Reply
from launch.serve.service import Service
from sampling import Canvas

LEFT = 499  # in the metrics: the client has gone
WRITING = 5  # seconds for the last part of a stream


async def answer(service: Service, request: Request, endpoint: Endpoint) -> HTTPResponse:
    """The response to a request. It is sampled until the client leaves or the time is over."""
    exchange, response = Exchange(service, request, endpoint), None
    try:
        response = await exchange.respond()
    except ApiError as error:
        exchange.status, response = error.status, error_response(error)
    except ClientDisconnect:
        exchange.status, response = LEFT, HTTPResponse(status_code=LEFT)
    finally:
        if not isinstance(response, Stream):
            exchange.count()
    return response


class Exchange:
    """One request and its response.

    Attributes:
        status: of HTTP, for the metrics.
    """

    def __init__(self, service: Service, request: Request, endpoint: Endpoint):
        self.service, self.request, self.endpoint = service, request, endpoint
        self.loop, self.changed = asyncio.get_running_loop(), asyncio.Event()
        self.started, self.status = self.loop.time(), 500

    async def respond(self) -> HTTPResponse:
        """The response, or the start of a stream.

        Raises:
            ApiError: the request cannot be answered.
            ClientDisconnect: the client has gone.
        """
        try:
            async with asyncio.timeout_at(self.deadline):
                body = parse_body(await self._body())
                self.query = read_query(body, self.endpoint, self.service.name, self.service.sampling)
                prompt = await self.service.read(self.service.encode, self.query, self.endpoint)
        except TimeoutError as error:
            raise self._late() from error
        self.job = self._submit(prompt)
        self.reply = Reply(self.endpoint, self.service.name, self.query, len(prompt))
        stream = None
        try:
            await self._change_unless_gone()
            if self.query.stream and not isinstance(self.job.outcome, Exception):
                stream = Stream(self)
                return stream
            response = await self._response()
            self._answered(response)
            return JSONResponse(self.reply.whole(response))
        finally:
            if stream is None:
                self.service.engine.cancel(self.job)

    @property
    def deadline(self) -> float:
        """The time of the event loop at which the request times out."""
        return self.started + self.service.config.timeout

    def _late(self) -> ApiError:
        seconds = self.service.config.timeout
        return ApiError(504, f"no answer within {seconds:g} seconds (launch.timeout)", code="timeout")

    async def _body(self) -> bytearray:
        """The body, unless it is too long.

        Raises:
            ApiError: it is.
        """
        most, body = self.service.config.max_body, bytearray()
        too_long = ApiError(
            413, f"the body has more than {most} bytes (launch.max_body)", code="body_too_long", connection="close"
        )
        if int(self.request.headers.get("content-length", "0")) > most:
            raise too_long
        async for part in self.request.stream():
            body += part
            if len(body) > most:
                raise too_long
        return body

    def count(self) -> None:
        """Count the request, which is over."""
        self.service.metrics.requests.labels(self.status).inc()

    def _submit(self, prompt: list[int]) -> Job:
        """Queue the canvas.

        Raises:
            ApiError: the queue is full, or nothing is sampled any more.
        """
        config = self.query.config
        canvas = Canvas.after(prompt, config.max_new_tokens, self.service.model.mask_token_id)
        job = Job(canvas, config, self._notify, watched=self.query.stream)
        try:
            self.service.engine.submit(job)
        except QueueFullError as error:
            waiting = self.service.engine.waiting
            raise ApiError(
                429, f"{waiting} requests wait already (launch.queue): try again", code="queue_full", retry_after="1"
            ) from error
        except EngineEndedError as error:
            raise ApiError(503, "the sampler has ended: start the server again", code="sampler_ended") from error
        return job

    def _notify(self) -> None:
        """Wake this exchange up, from the engine's thread."""
        with suppress(RuntimeError):  # the loop is closed
            self.loop.call_soon_threadsafe(self.changed.set)

    async def _change(self) -> None:
        """Wait for the next step or the end.

        Raises:
            ApiError: the time is over.
        """
        try:
            async with asyncio.timeout_at(self.deadline):
                await self.changed.wait()
        except TimeoutError as error:
            raise self._late() from error
        self.changed.clear()

    async def _change_unless_gone(self) -> None:
        """Wait for the first step of a stream, or for the end of another response.

        Raises:
            ApiError: the time is over.
            ClientDisconnect: the client has gone.
        """
        change, gone = asyncio.ensure_future(self._change()), asyncio.ensure_future(self.request.receive())
        try:
            await asyncio.wait((change, gone), return_when=asyncio.FIRST_COMPLETED)
            if not change.done():
                raise ClientDisconnect
            change.result()
        finally:
            change.cancel()
            gone.cancel()

    async def _response(self) -> Response:
        """The decoded response of a job that has ended.

        Raises:
            ApiError: it has ended with an error.
        """
        outcome = self.job.outcome
        if isinstance(outcome, ApiError):
            raise outcome
        if isinstance(outcome, ValueError):  # of the settings, see `special_tokens`
            raise setting_error(outcome, self.query.length) from outcome
        if isinstance(outcome, MemoryError | FloatingPointError):
            raise ApiError(500, str(outcome), code=type(outcome).__name__) from outcome
        if isinstance(outcome, Exception):
            raise ApiError(500, "the model failed: the server's log says why") from outcome
        return await self.service.read(response_of, outcome, self.service.tokenizer, self.query.config)

    async def events(self) -> AsyncIterator[str]:
        """Yield the parts of a stream as server-sent events."""
        try:
            if first := self.reply.first():
                yield event_of(first)
            async for part in self._parts():
                yield event_of(part)
            yield "data: [DONE]\n\n"
        except ApiError as error:
            self.status = error.status
            yield event_of(error.body)

    async def _parts(self) -> AsyncIterator[dict[str, Any]]:
        """Yield a part for each step that made text final, or for each step if the client asked for drafts.

        A client that is slower than the model misses steps.

        Raises:
            ApiError: the job or the time has ended.
        """
        service, job, query = self.service, self.job, self.query
        final, shown = await service.read(FinalText, service.tokenizer, query.config, service.eos), None
        while True:
            ended = job.outcome is not None
            if (event := job.event) is not shown:
                shown = event
                text = await service.read(final.after, event)
                forming = await service.read(draft, event, service.tokenizer) if query.drafts else None
                if text or forming:
                    yield self.reply.part(text, forming)
            if ended:
                break
            await self._change()
        response = await self._response()
        for part in self.reply.last(final.rest(response.text), response):
            yield part
        self._answered(response)

    def _answered(self, response: Response) -> None:
        self.status = 200
        self.service.metrics.answered(self.reply.prompt_tokens, response, self.loop.time() - self.started)


class Stream(StreamingResponse):
    """The stream of an exchange. If the client leaves, even before the first part, the canvas is dropped."""

    def __init__(self, exchange: Exchange):
        super().__init__(exchange.events(), media_type="text/event-stream")
        self.exchange = exchange
        exchange.status = LEFT  # until its end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream, but not for ever to a client that does not read it."""
        try:
            async with asyncio.timeout_at(self.exchange.deadline + WRITING):
                await super().__call__(scope, receive, send)
        except TimeoutError:
            pass  # as if the client had left
        finally:
            self.exchange.service.engine.cancel(self.exchange.job)
            self.exchange.count()


def event_of(part: dict[str, Any]) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(part, separators=(',', ':'))}\n\n"


def error_response(error: ApiError) -> JSONResponse:
    """The error in the API's form."""
    return JSONResponse(error.body, error.status, error.headers)
