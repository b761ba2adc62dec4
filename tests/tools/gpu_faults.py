"""A stage that goes wrong in every way; it imports no torch, so that it starts at once."""

from __future__ import annotations

import os
import time

from gpu_worker import Context, Item, Skip, note


def good(without):
    return {"say": "a figure", "without": list(without)}


def wrong(without):
    raise ValueError("two results differ\nand more")


def absent(without):
    raise Skip("no such program here")


def aborts(without):
    os.abort()


def exits(without):
    print("the last words")
    os._exit(7)


def hangs(without):
    time.sleep(100)


def of_parts(without):
    for part in ("first", "second"):
        if part not in without:
            note(part)
            if part == "second":
                os.abort()
    return {"parts": "the rest"}


def variable(without):
    return {"say": os.environ["WHICH"]}


def slow(without):
    time.sleep(0.6)


def items(context: Context) -> list[Item]:
    found = [
        Item("good/alone", good, alone=True),
        Item("bad/wrong", wrong),
        Item("bad/aborts", aborts),
        Item("bad/exits", exits),
        Item("bad/hangs", hangs, limit=0.5),
        Item("bad/parts", of_parts),
        Item("good/absent", absent),
        Item("good/variable", variable, environment=(("WHICH", "b"),)),
        Item("good/last", good),
    ]  # fmt: skip
    return found + [Item(f"slow/{i}", slow) for i in range(40)]
