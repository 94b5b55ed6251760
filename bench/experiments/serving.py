"""How many images a second examples/serve.py answers on the loopback address, and how fast.

python -m bench.experiments.serving MODEL PHOTOS --clients 1 4 8

Starts the server, sends photographs from threads, each of which waits for its answer, and stops the
server. The threads run on the same machine and take a part of its time.
"""

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import tyro

SERVER = Path(__file__).parents[2] / "examples" / "serve.py"


@contextlib.contextmanager
def serving(
    model: Path, port: int, *options: str
) -> Iterator[tuple[subprocess.Popen, httpx.Client]]:
    """A server of a model, ready for requests, and a client of it. A SIGTERM ends the server."""
    command = [sys.executable, SERVER, model, "--port", str(port), *options]
    with (
        subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True) as server,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=300) as client,
    ):
        try:
            while not _ready(client):
                if server.poll() is not None:
                    raise SystemExit("the server stopped before it was ready")
                time.sleep(0.1)
            yield server, client
        finally:
            server.send_signal(signal.SIGTERM)


def _ready(client: httpx.Client) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return client.get("/health").status_code == 200
    return False


def ask(client: httpx.Client, contents: Sequence[bytes], clients: int) -> tuple[list, list[float]]:
    """Sends images from threads. Returns the responses and the seconds of each."""

    def one(content: bytes) -> tuple[httpx.Response, float]:
        started = time.perf_counter()
        response = client.post("/predict", files={"image": content})
        return response, time.perf_counter() - started

    with ThreadPoolExecutor(clients) as pool:
        responses, seconds = zip(*pool.map(one, contents), strict=True)
    return list(responses), list(seconds)


def main(
    model: tyro.conf.Positional[Path],
    photos: tyro.conf.Positional[Path],
    clients: tuple[int, ...] = (1, 4, 8),
    requests: int = 200,
    port: int = 8765,
) -> None:
    """Prints a row of a table for each number of clients.

    Args:
        model: a folder or a file, as for naslora predict.
        photos: a folder of JPEG files.
        clients: numbers of threads that send images.
        requests: images that each number of clients sends together.
        port: of the server.
    """
    contents = [path.read_bytes() for path in sorted(photos.glob("*.jpg"))]
    contents = [contents[i % len(contents)] for i in range(requests)]
    print("| clients | images/s | p50, ms | p95, ms |\n| -- | -- | -- | -- |")
    with serving(model, port) as (_, client):
        for count in clients:
            ask(client, contents[: 2 * count], count)  # not counted
            started = time.perf_counter()
            responses, seconds = ask(client, contents, count)
            rate = requests / (time.perf_counter() - started)
            assert all(response.status_code == 200 for response in responses)
            p50, p95 = 1000 * np.quantile(seconds, [0.5, 0.95])
            print(f"| {count} | {rate:.2f} | {p50:.0f} | {p95:.0f} |", flush=True)


if __name__ == "__main__":
    tyro.cli(main)
