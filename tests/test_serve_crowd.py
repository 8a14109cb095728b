"""Two hundred clients at once: some hang up at any moment, some never read. Nothing leaks, nothing is stuck, and every answer
is the one that its client would have had alone."""

import asyncio
import gc
import json
import random
import threading
from collections.abc import Iterator

import pytest

from offload.serve.server import Server
from serving import completion, demo_engine, is_idle, running, until

NUM_CLIENTS = 200
PROMPTS = ("The Congress", "We the people", "Our nation", "I ask you", "The budget")
SEEDS = range(2)
TOKENS = 4


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running(lambda _: demo_engine(), max_waiting=NUM_CLIENTS, keep_alive_s=0.05, send_s=2.0) as server:
        yield server


def request_of(number: int) -> dict[str, object]:
    prompt, seed = PROMPTS[number % len(PROMPTS)], number % len(SEEDS)
    return completion(prompt, max_tokens=TOKENS, temperature=0.8, seed=seed, stream=number % 3 > 0)


async def talk(port: int, number: int, manner: str, chance: random.Random) -> str | None:
    """One client over a bare socket. "stays" returns its text; "leaves" hangs up at a random moment; "sulks" never reads."""
    body = json.dumps(request_of(number)).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    )
    message = head.encode() + b"Connection: close\r\n\r\n" + body
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        if manner == "leaves" and chance.random() < 0.3:
            writer.write(message[: chance.randrange(len(message))])  # before it has asked
            await writer.drain()
            return None
        writer.write(message)
        await writer.drain()
        if manner == "leaves":
            await asyncio.sleep(chance.uniform(0, 4))
            return None
        if manner == "sulks":
            await asyncio.sleep(4)
            return None
        return text_of(await asyncio.wait_for(reader.read(), 100))
    finally:
        writer.transport.abort()


def text_of(response: bytes) -> str:
    head, _, body = response.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200"), response[:300]
    if b"text/event-stream" not in head:
        return str(json.loads(body)["choices"][0]["text"])
    lines = [line.strip() for line in body.splitlines() if line.strip().startswith(b"data: ")]
    assert lines[-1] == b"data: [DONE]"
    return "".join(json.loads(line[6:])["choices"][0]["text"] for line in lines[:-1])


async def crowd(port: int) -> list[tuple[int, str]]:
    """What those who stayed were told, by their number."""
    chance = random.Random(0)
    manners = ["leaves", "stays", "stays", "stays"] * (NUM_CLIENTS // 4)
    manners[2:40:4] = ["sulks"] * len(manners[2:40:4])
    chance.shuffle(manners)
    talks = [talk(port, number, manner, random.Random(number)) for number, manner in enumerate(manners)]
    texts = await asyncio.gather(*talks)
    return [(number, text) for number, text in enumerate(texts) if text is not None]


def objects_alive() -> int:
    gc.collect()
    names = ("Answer", "EventStream", "Generation", "Job", "RequestResponseCycle")
    return sum(type(one).__name__ in names for one in gc.get_objects())


@pytest.mark.slow
def test_a_crowd_gets_the_answers_that_each_would_get_alone(server: Server) -> None:
    engine = server.worker.engine
    assert engine is not None
    alone = {
        (prompt, seed): engine.generate(prompt, max_new_tokens=TOKENS, temperature=0.8, seed=seed).text
        for prompt in PROMPTS
        for seed in SEEDS
    }
    alive = objects_alive()
    num_threads, num_tasks = threading.active_count(), len(server.server_state.tasks)
    told = asyncio.run(crowd(int(server.url.rpartition(":")[2])))
    assert len(told) == NUM_CLIENTS - NUM_CLIENTS // 4 - 10
    for number, text in told:
        request = request_of(number)
        assert text == alone[str(request["prompt"]), int(str(request["seed"]))], number
    until(lambda: is_idle(server), 20)
    until(lambda: not server.server_state.connections and len(server.server_state.tasks) == num_tasks, 20)
    assert objects_alive() <= alive + 1  # the engine keeps its last generation
    assert threading.active_count() <= num_threads + 4  # the pool that admits keeps a few
    assert engine.generate(PROMPTS[0], max_new_tokens=TOKENS, temperature=0.8, seed=0).text == alone[PROMPTS[0], 0]
