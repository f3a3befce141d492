"""Speed and memory, as ratios within one run: `python -m tests.bench [NAME...] [--quick] [--out FILE]`.

Ours and the reference take turns in one process, on the same data and threads, so that a busy or slow machine moves both.
Rates are medians over the turns. Each value has a bound, which no change may fall behind, and a goal; results land in
`tests/bench/results`, one JSON per machine, and the table shows what stood there before. Needs no network; where the real
recordings of `../shared/data/esc10` lie, they are used, else synthetic ones. All else is written to a temporary folder.
A value beyond its bound makes the exit status 1, except with `--quick`, which runs on sizes too small to mean anything.
"""
