"""Nodes that are told to go while their workers start, and when the last shard is done; the workers are real ones."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import pytest

from ovss_ray.run import driver, pool
from ovss_ray.run.driver import run_job
from ovss_ray.run.engines import LocalEngine
from ovss_ray.run.job import LabellingJob
from ovss_ray.run.pool import Place, WorkerHandle
from ovss_ray.spec import JobSpec

MakeSpec = Callable[..., JobSpec]


class Nodes(LocalEngine):
    """Two workers in this process, each said to be on a node of its own, of which one is told to go.

    Args:
        leaves: "encoder": the first node, while its worker encodes the vocabulary; "waiting": the second, while its
            worker waits for that; "done": each, when its worker has done what it was given.
    """

    def __init__(self, spec: JobSpec, leaves: str) -> None:
        super().__init__(spec)
        self.leaves = leaves
        self.is_left = threading.Event()
        self.workers: list[OnNode] = []
        self.encoder: OnNode | None = None  # the first one

    def capacity(self) -> int:
        return 2

    def launch(self, job: LabellingJob) -> WorkerHandle:
        self.workers.append(OnNode(self, super().launch(job), f"node-{len(self.workers) + 1}"))
        return self.workers[-1]

    def leaving_nodes(self) -> set[str]:
        if self.leaves == "done":
            return {worker.node for worker in self.workers if worker.shards and all(map(Future.done, worker.shards))}
        first_two = self.workers[:2]
        if self.encoder is None or not all(worker.loaded for worker in first_two):
            return set()
        return {worker.node for worker in first_two if (worker is self.encoder) == (self.leaves == "encoder")}


class OnNode:
    """A worker of the local engine; the vocabulary takes it until a node was left."""

    def __init__(self, nodes: Nodes, worker: WorkerHandle, node: str) -> None:
        self.nodes = nodes
        self.worker = worker
        self.node = node
        self.loaded = False
        self.shards: list[Future[Any]] = []

    def place(self) -> Future[Place]:
        placed: Future[Place] = Future()
        placed.set_result(Place(self.node))
        return placed

    def call(self, method: str, *arguments: Any) -> Future[Any]:
        called = self.worker.call(method, *arguments)
        if method == "load":
            called.add_done_callback(lambda _: setattr(self, "loaded", True))
        if method == "label_shard":
            self.shards.append(called)
        if method != "encode_text":
            return called
        self.nodes.encoder = self.nodes.encoder or self
        encoded: Future[Any] = Future()

        def finish() -> None:
            self.nodes.is_left.wait(60)
            encoded.set_result(called.result())

        threading.Thread(target=finish, daemon=True).start()
        return encoded

    def kill(self) -> None:
        self.nodes.is_left.set()
        self.worker.kill()


@pytest.mark.parametrize("leaves", ["encoder", "waiting", "done"])
def test_a_node_that_goes_while_workers_start_or_are_done_leaves_a_complete_run(
    leaves: str, make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines: list[Nodes] = []

    def open_nodes(spec: JobSpec) -> Nodes:
        engines.append(Nodes(spec, leaves))
        if leaves == "done":
            engines[-1].is_left.set()
        return engines[-1]

    monkeypatch.setattr(driver, "open_engine", open_nodes)
    monkeypatch.setattr(pool, "SURVEY_EVERY_S", -1.0)
    assert run_job(make_spec(limit=32)).statuses == {"ok": 32}
    if leaves != "done":
        assert len(engines[0].workers) == 3
