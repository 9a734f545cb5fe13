#!/usr/bin/env bash
# `torch.linalg.lstsq` on a CPU gives other bytes from call to call, on the same small system.
# guess: one process, one thread, one input: the same bits every time.
# seen:  several results in 300 calls by the default driver, "gelsy", where memory was used and freed
#        in between; one result each by "gels", "gelsd" and "gelss". LAPACK's gelsy also READS its
#        array of pivots (entries but 0 move a column to the front), which then was not cleared.
# Versions: torch 2.13.0.
# Who is hurt: whoever promises that the same command gives the same file. All results are right
# within rounding, so that no test of closeness sees it. Here merging names the driver.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --no-compile torch==2.13.0 numpy==2.4.6
cd "$work"
"$work/venv/bin/python" -W ignore - <<'END'
import torch

torch.set_num_threads(1)
torch.manual_seed(0)
half = torch.randn(7, 7)
system, wanted = half @ half.T + torch.eye(7), torch.randn(7, 1)
results = {}
for driver in ("gelsy", "gels", "gelsd", "gelss"):
    found = set()
    for number in range(300):
        used = [torch.full((size,), number % 3, dtype=torch.int32) for size in (6, 7, 8)]
        del used
        solution = torch.linalg.lstsq(system, wanted, driver=driver).solution
        assert (system @ solution - wanted).abs().max() < 1e-4
        found.add(solution.numpy().tobytes())
    results[driver] = len(found)
print("different results in 300 calls:", results)
assert results.pop("gelsy") > 1 and set(results.values()) == {1}
default = torch.linalg.lstsq(system, wanted).solution    # the documented default on a CPU
assert (default - torch.linalg.lstsq(system, wanted, driver="gelsy").solution).abs().max() < 1e-4
END
