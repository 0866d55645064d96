"""Our runtime against six CPU engines on the same 201 M-parameter random Llama, two threads, in the same run.

    runtime_peers.py [--no-install] [--only NAME,NAME] [--rounds N]

Nine cells: prefill (512 tokens) and decode at batch 1 and 16, each at bf16, int8 and int4. An engine takes part at the
precisions it has; on a processor without bf16 instructions vLLM and transformers would emulate them, and run fp32.
What is missing is installed into the cache folder (about an hour on two cores, once, half of it to build llama.cpp);
--no-install uses what is there. Engines take turns over several rounds, each run in a process of its own. After the
first round those go on that came within HOPELESS of the best in some cell; the others keep their figures of one round.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from peers.engines import HERE, PEERS, Engine, ready, say

from bars import Bar, finish, spread
from paretune.kernels.jit import user_cache_dir
from paretune.runtime.random_model import SHAPES, write_random_model

ROUNDS = 3
HOPELESS = 0.85
ENGINE_LIMIT_S = 400.0
# No round begins that would not end by then.
LAST_ROUND_ENDS_S = 2100.0

PRECISIONS = ("bf16", "int8", "int4")
FIGURES = ("prefill", "decode_1", "decode_16")
OURS = "paretune"
MOST_RESIDENT = 1.25
WINS, FLOOR = 7, 0.85

Key = tuple[str, str]  # engine, precision


def prepare(cache: Path, only: set[str] | None, may_install: bool) -> list[Engine]:
    """The engines to compare; a peer that is not there is left out, and that is said."""
    model = cache / "llama200m-bf16"
    if not model.exists():
        say("writing the random model ...")
        write_random_model(model, **SHAPES["llama200m"], dtype="bfloat16", seed=1234)
    ours = [sys.executable, str(HERE / "run_paretune.py"), str(model)]
    engines = [Engine(OURS, precision, precision, [*ours, precision]) for precision in PRECISIONS]
    for peer in PEERS:
        if only is not None and peer.name not in only:
            continue
        try:
            if ready(peer.name, cache, may_install):
                engines += peer.engines(cache, model)
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            why = getattr(error, "stderr", None) or b""
            say(f"left out: {peer.name}: {error}\n{why.decode(errors='replace')[-1500:]}")
    return engines


def run(engine: Engine) -> dict[str, Any] | None:
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    label = f"{engine.name:<18} {engine.precision}"
    try:
        done = subprocess.run(
            engine.command, capture_output=True, text=True, env=environment, timeout=ENGINE_LIMIT_S, cwd=HERE
        )
    except subprocess.TimeoutExpired:
        say(f"{label}  did not end within {ENGINE_LIMIT_S:.0f} s")
        return None
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode != 0 or not lines:
        say(f"{label} failed:\n{done.stderr[-1500:]}")
        return None
    result: dict[str, Any] = json.loads(lines[-1])
    figures = "  ".join(f"{figure} {result[figure]:8.1f}" for figure in FIGURES)
    say(f"{label}  {figures}  resident {result['resident_mb']:6.0f} MB, peak {result['peak_mb']:6.0f}")
    return result


def medians(runs: dict[Key, list[dict[str, Any]]]) -> dict[Key, dict[str, float]]:
    return {
        key: {figure: statistics.median(one[figure] for one in results) for figure in FIGURES}
        for key, results in runs.items()
    }


def contenders(engines: list[Engine], runs: dict[Key, list[dict[str, Any]]]) -> list[Engine]:
    """Ours, and who is near the best of its precision somewhere."""
    figures = medians(runs)

    def hopeful(key: Key) -> bool:
        rivals = [other for other in figures if other[1] == key[1] and other[0] != OURS]
        return any(
            figures[key][figure] >= HOPELESS * max(figures[rival][figure] for rival in rivals) for figure in FIGURES
        )

    keys = {key for key in figures if key[0] == OURS or hopeful(key)}
    return [engine for engine in engines if (engine.name, engine.precision) in keys]


def compare(engines: list[Engine], rounds: int) -> dict[Key, list[dict[str, Any]]]:
    runs: dict[Key, list[dict[str, Any]]] = {}
    took: dict[Key, float] = {}
    begin = time.monotonic()
    for number in range(rounds):
        if number > 0:
            engines = contenders(engines, runs)
            needed = sum(took[engine.name, engine.precision] for engine in engines)
            if time.monotonic() - begin + needed > LAST_ROUND_ENDS_S:
                say("no time for another round")
                break
        say(f"round {number + 1} of {rounds}, {len(engines)} engines")
        for engine in engines:
            started = time.monotonic()
            result = run(engine)
            took[engine.name, engine.precision] = time.monotonic() - started
            if result is not None:
                runs.setdefault((engine.name, engine.precision), []).append(result)
    return runs


def bars_of(runs: dict[Key, list[dict[str, Any]]]) -> list[Bar]:
    figures = medians(runs)
    ratios: list[float] = []
    bars = []
    for precision in PRECISIONS:
        for figure in FIGURES:
            peers = {name: of[figure] for (name, at), of in figures.items() if at == precision and name != OURS}
            ours = figures.get((OURS, precision))
            if not peers or ours is None:
                bars.append(Bar(f"{figure} {precision}: nothing to compare", None, FLOOR))
                continue
            best = max(peers, key=peers.__getitem__)
            ratios.append(ours[figure] / peers[best])
            bars.append(Bar(f"{figure} {precision}: ours / best peer ({best})", ratios[-1], FLOOR))
    bars.append(Bar("cells in which ours is at least as fast as the best peer", sum(r >= 1 for r in ratios), WINS))
    for precision in PRECISIONS:
        ours = [
            (one["resident_mb"] - one["imported_mb"]) / one["weights_and_kv_mb"]
            for one in runs.get((OURS, precision), [])
        ]
        value = statistics.median(ours) if ours else None
        name = f"resident above a process that has only imported / (weights + KV), {precision}"
        bars.append(Bar(name, value, MOST_RESIDENT, at_least=False))
    return bars


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-install", action="store_true", help="compare with the peers that are there")
    parser.add_argument("--only", help="these peers, by name, separated by commas")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    asked = parser.parse_args()
    root = user_cache_dir()
    if root is None:
        say("no cache folder that can be written: set PARETUNE_CACHE_DIR")
        return 1
    cache = root / "peers"
    cache.mkdir(exist_ok=True)
    only = None if asked.only is None else set(asked.only.split(","))
    engines = prepare(cache, only, not asked.no_install)
    runs = compare(engines, asked.rounds)
    if {name for name, _ in runs} <= {OURS}:
        say("nothing to compare: every peer is missing")
        return 1
    computes = {(engine.name, engine.precision): engine.computes for engine in engines}
    details = [
        {
            "engine": name,
            "precision": precision,
            "computes": computes[name, precision],
            "version": results[0]["version"],
            **{figure: spread([one[figure] for one in results]) for figure in FIGURES},
            "resident_mb": statistics.median(one["resident_mb"] for one in results),
            "peak_mb": statistics.median(one["peak_mb"] for one in results),
        }
        for (name, precision), results in runs.items()
    ]
    # a part of the peers, or of the rounds, is for looking, not for the record
    whole = only is None and asked.rounds >= ROUNDS
    finish(bars_of(runs), details, "runtime_peers" if whole else None)
    return 0


if __name__ == "__main__":
    sys.exit(main())
