"""What each budget costs, as a plot, and the smallest that costs little enough.

python examples/choose_a_budget.py MODEL TEXT [OUT]      TEXT: a held-out text of the kind that the model will see
"""

import sys
from pathlib import Path

import kvfold
from kvfold.report.plots import frontier_plot

MODEL, TEXT, OUT = [*sys.argv[1:], "budgets"][:3]
ENOUGH = 0.01  # nats per token that predictions may move

found = kvfold.compare(
    MODEL,
    presets=["auto"],
    budgets=[1 / 2, 1 / 4, 1 / 8, 1 / 16],
    calibration={"data": "self"},
    eval_files=[TEXT],
    out=OUT,
)
measured = [row for row in found.rows if row.evaluation]
for row in measured:
    megabytes = row.kv_bytes_at_32k / 1e6
    print(f"{row.asked_budget:.4f} of the bytes: KL {row.evaluation.kl:.5f}, {megabytes:,.0f} MB at 32k tokens")
points = [(row.evaluation.kv_budget, row.evaluation.kl) for row in measured]
Path(OUT, "budgets.svg").write_text(frontier_plot([("auto", points)]))
enough = [row.asked_budget for row in measured if row.evaluation.kl <= ENOUGH]
print(f"take {min(enough):.4f}, see {OUT}/budgets.svg" if enough else "every one of them costs more")
