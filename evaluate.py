"""Measuring a trained model on a split, beside the controls that show whether it looks at the picture.

- Balanced accuracy overall, by family, level, template, object and place, each with n and a 95% interval.
- Controls: majority (50 by construction), blank picture, another scene's picture. Vision gain: accuracy minus the best.
- Held-out paraphrases and held-out questions beside the test split; the first wrong answers in words.
- Writes out_dir/eval.json (every figure) and out_dir/failures.jsonl (every wrong answer).

    python evaluate.py
    python evaluate.py --checkpoint=out/default/last.pt --split=val

Intervals: percentile bootstrap over pictures, since the commands of one picture are not independent (Efron and
Tibshirani 1993, chapter 13).
"""
import json
import math
from pathlib import Path

import numpy as np

import config
import prepare
from config import UserError
from train import Data, load_model, pick_dtype, predict


def bootstrap_interval(truth, said, picture, resamples, seed=0):
    """Balanced accuracy in % and its 95% interval: (value, low, high), None without YES or without NO items.

    truth, said: (n,) bool; picture: (n,) int, the unit that is resampled.
    """
    truth, said = np.asarray(truth, bool), np.asarray(said, bool)
    if truth.all() or not truth.any():
        return None
    _, unit = np.unique(picture, return_inverse=True)
    # Per picture: YES items, those answered right, NO items, those answered right. A resample is a sum of these rows.
    table = np.zeros((unit.max() + 1, 4))
    for column, mask in enumerate((truth, truth & said, ~truth, ~truth & ~said)):
        np.add.at(table[:, column], unit[mask], 1)
    rng = np.random.default_rng(seed)
    draws = rng.multinomial(len(table), np.full(len(table), 1 / len(table)), size=resamples) @ table
    yes, yes_right, no, no_right = draws.T
    valid = (yes > 0) & (no > 0)
    values = 50 * (yes_right[valid] / yes[valid] + no_right[valid] / no[valid])
    total = table.sum(0)
    value = 50 * (total[1] / total[0] + total[3] / total[2])
    low, high = np.percentile(values, (2.5, 97.5)) if len(values) else (math.nan, math.nan)
    return float(value), float(low), float(high)


def breakdown(items, truth, said, picture, cfg):
    """{group: {name: row}}: rows of `summary` for overall, family, level, template, object and place."""
    groups = {"overall": [("all",)] * len(items)}
    for key in ("family", "level", "template"):
        groups[key] = [(i[key],) for i in items]
    groups["object"] = [prepare.Question(i["template"], i["first"], i["second"]).objects for i in items]
    groups["place"] = [(i["place"] or "anywhere",) for i in items]
    result = {}
    for group, memberships in groups.items():
        result[group] = {}
        for name in sorted({m for ms in memberships for m in ms}):
            mine = np.array([name in ms for ms in memberships])
            result[group][name] = summary(truth[mine], said[mine], picture[mine], cfg)
    return result


def summary(truth, said, picture, cfg):
    """One row of a table: n and balanced accuracy in % with its interval (None where there is only one class)."""
    found = bootstrap_interval(truth, said, picture, cfg.bootstrap) if len(truth) else None
    return dict(n=len(truth), accuracy=found and round(found[0], 3), low=found and round(found[1], 3),
                high=found and round(found[2], 3))


def show(row):
    if row["accuracy"] is None:
        return f"{'-':>6} {'':<16} n={row['n']}"
    return f"{row['accuracy']:6.2f} [{row['low']:5.1f}, {row['high']:5.1f}]  n={row['n']}"


def evaluate(cfg):
    """Evaluate cfg.checkpoint (empty: out_dir/best.pt) on cfg.split; prints the page, writes and returns eval.json."""
    model, cfg, tokenizer, state, device = load_model(cfg)
    meta = prepare.load_meta(cfg)
    if state["data_hash"] != meta["hash"]:
        print("note: the checkpoint was trained on data made with other settings")
    dtype, reason = pick_dtype(cfg, device)
    print(f"device {device}, dtype {str(dtype)[6:]} ({reason}); checkpoint of step {state['step']}")
    data = Data(cfg, meta, cfg.split)
    if data.tokenizer.words != tokenizer.words:
        raise UserError(f"the checkpoint's vocabulary is not that of the data in {cfg.data_dir}: train again, "
                        "or pass the --data_dir that it was trained on")
    items = prepare.read_items(cfg.data_dir, cfg.split)
    results = {}
    for picture in ("right", "blank", "wrong"):
        rows, odds = predict(model, data, cfg, device, dtype, picture)
        results[picture] = (rows, odds)
    rows, odds = results["right"]
    if not len(rows):
        raise UserError(f"the {cfg.split} split in {cfg.data_dir} holds no questions")
    asked, truth, unit = [items[r] for r in rows], data.index[rows, 3] == 1, data.index[rows, 0]
    page = dict(split=cfg.split, step=state["step"], data_hash=meta["hash"],
                **breakdown(asked, truth, odds > 0, unit, cfg))
    page["controls"] = {"blank picture": summary(truth, results["blank"][1] > 0, unit, cfg),
                        "wrong picture": summary(truth, results["wrong"][1] > 0, unit, cfg)}
    page["controls by template"] = {}
    for template in page["template"]:
        mine = np.array([i["template"] == template for i in asked])
        page["controls by template"][template] = {
            p: summary(truth[mine], results[p][1][mine] > 0, unit[mine], cfg) for p in ("blank", "wrong")}
    best_control = max([50.0] + [c["accuracy"] for c in page["controls"].values() if c["accuracy"] is not None])
    overall = page["overall"]["all"]["accuracy"]
    page["vision gain"] = None if overall is None else round(overall - best_control, 3)
    page["held out"] = {}
    for name in ("test_words", "test_combos") if cfg.split == "test" else ():
        held = Data(cfg, meta, name)
        held_rows, held_odds = predict(model, held, cfg, device, dtype)
        page["held out"][name] = summary(held.index[held_rows, 3] == 1, held_odds > 0, held.index[held_rows, 0], cfg)

    print(f"\n{cfg.split} split: balanced accuracy in %, 95% interval over pictures, n questions")
    for group in ("overall", "family", "level", "template", "object", "place"):
        print(f"\n{group}")
        for name, row in page[group].items():
            print(f"  {name:<16} {show(row)}")
    print("\ncontrols (majority: 50 by construction)")
    for name, row in page["controls"].items():
        print(f"  {name:<16} {show(row)}")
    print(f"  vision gain      {page['vision gain']}")
    if page["held out"]:
        print("\nnever trained on: paraphrases (test_words), questions (test_combos)")
        for name, row in page["held out"].items():
            print(f"  {name:<16} {show(row)}")

    out, wrong = Path(cfg.out_dir), np.flatnonzero((odds > 0) != truth)
    frames = None
    with open(Path(cfg.data_dir) / "frames.jsonl", encoding="utf-8") as file:
        needed = set(unit[wrong].tolist())
        frames = {f["index"]: f for f in map(json.loads, file) if f["index"] in needed}
    try:
        out.mkdir(parents=True, exist_ok=True)
        with open(out / "failures.jsonl", "w", encoding="utf-8") as file:
            for w in wrong:
                item = asked[w]
                file.write(json.dumps(dict(frame=frames[item["picture"]]["name"], command=item["command"],
                                           truth="YES" if item["answer"] else "NO", reason=item["reason"],
                                           p_yes=round(float(1 / (1 + math.exp(-odds[w]))), 4),
                                           template=item["template"])) + "\n")
        (out / "eval.json").write_text(json.dumps(page, indent=1), encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write to out_dir {out}: {error}") from None
    print(f"\n{len(wrong)} wrong answers; the first:")
    for w in wrong[:5]:
        view = prepare.View(frames[asked[w]["picture"]], cfg)
        print(f"  {frames[asked[w]['picture']]['name']}: {prepare.commands.describe(view, 9)}\n"
              f"    {asked[w]['command']}? said {'YES' if odds[w] > 0 else 'NO'}, truth "
              f"{'YES' if truth[w] else 'NO'}: {asked[w]['reason']}")
    print(f"\nwrote {out / 'eval.json'} and {out / 'failures.jsonl'}")
    return page


if __name__ == "__main__":
    config.run(evaluate, __doc__)
