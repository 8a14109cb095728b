"""A device that is full for a while: clients are told to come again, and when they do they are answered."""

from pathlib import Path

from fakes import layer_fault
from serving import MODEL, chat, client, completion, running, tiny_engine


def test_a_device_without_memory_is_503_and_answers_again_when_it_has_some(tmp_path: Path) -> None:
    is_full = False
    with running(lambda _: tiny_engine(tmp_path)) as server, client(server) as http:
        engine = server.worker.engine
        assert engine is not None
        expected = http.post("/v1/completions", json=completion()).json()["choices"][0]["text"]
        with layer_fault(engine, 1, lambda: is_full) as failed:
            for ask in (completion(), chat()):
                is_full = True
                refused = http.post("/v1/completions" if "prompt" in ask else "/v1/chat/completions", json=ask)
                error = refused.json()["error"]
                assert (refused.status_code, error["code"], error["type"]) == (503, "out_of_memory", "server_error")
                assert int(refused.headers["retry-after"]) > 0 and "Tried to allocate" in error["message"]
                assert http.get("/health").status_code == 200
                is_full = False
                answered = http.post("/v1/completions", json=completion())
                assert answered.status_code == 200 and answered.json()["choices"][0]["text"] == expected
        assert len(failed) > 2
        assert 'run70b_requests_total{outcome="error"} 2.0' in http.get("/metrics").text
        # What one request asks too much of is still the request's own fault.
        too_long = http.post("/v1/completions", json=completion(max_tokens=100_000))
        assert (too_long.status_code, too_long.json()["error"]["code"]) == (400, "context_length_exceeded")


def test_a_stream_that_has_begun_ends_with_the_error_in_it(tmp_path: Path) -> None:
    with running(lambda _: tiny_engine(tmp_path)) as server, client(server) as http:
        engine = server.worker.engine
        assert engine is not None
        with layer_fault(engine, 1, lambda: engine.loop.sessions._places[0].segments[0].length > 12):
            lines = http.post("/v1/completions", json=completion(stream=True, max_tokens=64, ignore_eos=True)).text
        assert '"code":"out_of_memory"' in lines.replace('": "', '":"') and MODEL in lines
