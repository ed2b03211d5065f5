"""Show how a DICOM node is: /health, /metrics and a page of today's X-rays, on this machine only. Torch-free."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from html import escape
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from bsdiff_rt import __version__
from bsdiff_rt.errors import SettingsError
from bsdiff_rt.node.journal import Journal, Line

HOST = "127.0.0.1"
_BUCKETS_S = (1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1800, 3600, 86400)
_LINES = 2000  # of the page
_STYLE = (
    ":root{color-scheme:light dark;--good:#1a7f37;--bad:#b40}"
    "@media(prefers-color-scheme:dark){:root{--good:#4ac26b;--bad:#f0883e}}"
    "body{font:15px/1.5 system-ui,sans-serif;margin:1.5em auto;padding:0 1.5em;max-width:70em}"
    "h1{font-size:1.5em;margin:0}h2{font-size:1.15em;margin:1.5em 0 .4em}p,ul{margin:.3em 0}ul{padding-left:1.2em}"
    "div{overflow-x:auto}table{border-collapse:collapse;width:100%}td:last-child{white-space:normal;min-width:16em}"
    "th,td{text-align:left;vertical-align:top;padding:.3em .8em;border-bottom:1px solid #8884;white-space:nowrap}"
    ".number{text-align:right;font-variant-numeric:tabular-nums}"
    ".done,.good{color:var(--good)}.refused,.failed,.away{color:var(--bad)}"
)
_WORKING = '<p class="good">Working.</p>'


@dataclass(frozen=True)
class State:
    """How the node is, beside what its journal says.

    Attributes:
        problems: why it does not work, one line each; empty if it does.
        counts: X-rays since the start, by what was answered (`Receiver.counts`).
        quota_bytes: how much of the disk files may take.
        destinations: where results are sent.
    """

    problems: list[str]
    counts: dict[str, int]
    quota_bytes: int
    destinations: list[str]


class StatusServer:
    """The HTTP server of a node, on the loopback address.

    Args:
        port: TCP port; 0 for any free one.
        journal: of the node.
        read_state: returns how the node is now.

    Raises:
        SettingsError: the port cannot be used.
    """

    def __init__(self, port: int, journal: Journal, read_state: Callable[[], State]) -> None:
        self._journal, self._read_state = journal, read_state
        self._registry = CollectorRegistry()
        self._registry.register(_JournalMetrics(journal, read_state))
        self._seconds = Histogram(
            "bsdiff_rt_seconds_to_sent",
            "Seconds from the reception of an X-ray to the arrival of its result.",
            buckets=_BUCKETS_S,
            registry=self._registry,
        )
        try:
            self._server = ThreadingHTTPServer((HOST, port), partial(_Handler, self))
        except OSError as error:
            raise SettingsError(
                f"port {port} cannot be used ({error.strerror}). Choose another one.", setting="http"
            ) from error
        self.port = int(self._server.server_address[1])
        Thread(target=self._server.serve_forever, name="status page", daemon=True).start()

    def close(self) -> None:
        """Stop the server."""
        self._server.shutdown()
        self._server.server_close()

    def observe_sent(self, seconds: float) -> None:
        """Count a result that has arrived, and how long it took since its X-ray was received."""
        self._seconds.observe(seconds)

    def answer(self, path: str) -> tuple[int, str, bytes] | None:
        """Return status, content type and body of a page, or None if there is none."""
        if path == "/health":
            problems = self._read_state().problems
            body = json.dumps({"status": "failing" if problems else "ok", "problems": problems})
            return 503 if problems else 200, "application/json", body.encode()
        if path == "/metrics":
            return 200, CONTENT_TYPE_LATEST, generate_latest(self._registry)
        if path == "/":
            return 200, "text/html; charset=utf-8", self._write_page().encode()
        return None

    def _write_page(self) -> str:
        today = datetime.now().astimezone().replace(hour=0, minute=0, second=0, microsecond=0).timestamp()
        state, lines = self._read_state(), self._journal.list_since(today, _LINES)
        unsent = self._journal.count_unsent()
        return write_page(lines, state, unsent, self._journal.count_bytes())


class _Handler(BaseHTTPRequestHandler):
    """Answers GET requests, and logs nothing."""

    server_version, sys_version = "bsdiff-rt", ""
    timeout = 10

    def __init__(self, status: StatusServer, *arguments: object) -> None:
        self._status = status
        super().__init__(*arguments)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        """Answer a request."""
        code, kind, body = self._status.answer(self.path.partition("?")[0]) or (404, "text/plain", b"not found\n")
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Security-Policy", "default-src 'none'; style-src 'unsafe-inline'")
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        """Log nothing: a monitor asks every few seconds."""


class _JournalMetrics(Collector):
    """What the journal says, as metrics."""

    def __init__(self, journal: Journal, read_state: Callable[[], State]) -> None:
        self._journal, self._read_state = journal, read_state

    def collect(self) -> Iterable[Metric]:
        """Yield the metrics."""
        state = self._read_state()
        objects = GaugeMetricFamily("bsdiff_rt_objects", "X-rays in the journal by state.", labels=["state"])
        for name, count in self._journal.count_states().items():
            objects.add_metric([name], count)
        yield objects
        unsent = GaugeMetricFamily("bsdiff_rt_unsent", "Results that wait for a destination.", labels=["destination"])
        oldest = GaugeMetricFamily(
            "bsdiff_rt_oldest_unsent_seconds", "Age of the oldest one of them.", labels=["destination"]
        )
        waiting = dict.fromkeys(state.destinations, (0, time.time())) | self._journal.count_unsent()
        for name, (count, since) in waiting.items():
            unsent.add_metric([name], count)
            oldest.add_metric([name], max(0.0, time.time() - since) if count else 0.0)
        yield from (unsent, oldest)
        commitments = GaugeMetricFamily(
            "bsdiff_rt_commitments", "Results by state of their storage commitment.", labels=["state"]
        )
        for name, count in self._journal.count_commitments().items():
            commitments.add_metric([name], count)
        yield commitments
        yield GaugeMetricFamily("bsdiff_rt_disk_bytes", "Bytes of X-rays and results.", self._journal.count_bytes())
        yield GaugeMetricFamily("bsdiff_rt_quota_bytes", "Bytes that they may take.", state.quota_bytes)
        yield GaugeMetricFamily("bsdiff_rt_up", "Whether the node works.", float(not state.problems))
        answered = CounterMetricFamily(
            "bsdiff_rt_answered", "X-rays and associations since the start, by answer.", labels=["answer"]
        )
        for name in ("new", "known", "no_room", "damaged", "rejected"):
            answered.add_metric([name], state.counts.get(name, 0))
        yield answered


def write_page(lines: list[Line], state: State, unsent: dict[str, tuple[int, float]], used_bytes: int) -> str:
    """Return the status page: problems, destinations, and one line for each X-ray. It holds nothing from a header.

    Args:
        lines: X-rays, the newest first.
        state: how the node is.
        unsent: number of results that wait, and reception time of the oldest, by destination.
        used_bytes: size of all files.
    """
    problems = "".join(f'<p class="failed">{escape(problem)}</p>' for problem in state.problems)
    destinations = "".join(
        f'<li class="{"away" if name in unsent else ""}">{escape(name)}: {_describe_unsent(unsent.get(name))}</li>'
        for name in dict.fromkeys([*state.destinations, *unsent])
    )
    rows = "".join(_write_row(line) for line in lines)
    return (
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><meta http-equiv="refresh" content="30">'
        f"<title>bsdiff-rt</title><style>{_STYLE}</style></head><body><h1>bsdiff-rt {escape(__version__)}</h1>"
        f"<p>Not for diagnostic use.</p>{problems or _WORKING}<h2>Destinations</h2><ul>{destinations}</ul>"
        f"<p>Files: {used_bytes / 1e9:.2f} of {state.quota_bytes / 1e9:.2f} GB.</p>"
        f"<h2>Today: {len(lines)} X-ray{'' if len(lines) == 1 else 's'}</h2>"
        f'<div><table><thead><tr><th class="number">Number</th><th>Received</th><th>From</th><th>State</th>'
        f'<th class="number">Seconds</th><th>Sent</th><th>Committed</th><th>Remark</th></tr></thead>'
        f"<tbody>{rows}</tbody></table></div></body></html>\n"
    )


def _describe_unsent(waiting: tuple[int, float] | None) -> str:
    if waiting is None:
        return "everything sent"
    since = datetime.fromtimestamp(waiting[1]).astimezone()
    results = "1 result waits" if waiting[0] == 1 else f"{waiting[0]} results wait"
    return f"{results}, the oldest since {since:%Y-%m-%d %H:%M}"


def _count(done: int, waiting: int) -> str:
    return f"{done} of {done + waiting}" if done + waiting else ""


def _write_row(line: Line) -> str:
    received = datetime.fromtimestamp(line.received_at).astimezone()
    seconds = "" if line.ended_at is None else f"{line.ended_at - line.received_at:.1f}"
    sent = _count(line.sent, line.unsent)
    committed = _count(line.committed, line.uncommitted)
    return (
        f'<tr><td class="number">{line.number}</td><td>{received:%H:%M:%S}</td><td>{escape(line.sender)}</td>'
        f'<td class="{line.state}">{line.state}</td><td class="number">{seconds}</td><td>{sent}</td>'
        f"<td>{committed}</td><td>{escape(line.reason or '')}</td></tr>"
    )
