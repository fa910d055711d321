"""Descriptions of tasks, written and improved by a language model (generate, optimize)."""

from __future__ import annotations

from typing import Literal


def generate(
    task: str,
    model: str,
    n: int = 20,
    keep: int = 10,
    unseen: int = 5,
    source: str = "tiny",
    about: str | None = None,
    out: str | None = None,
    overwrite: bool = False,
    judge: bool = False,
    seed: int = 0,
    base_url: str | None = None,
    key_env: str = "OPENAI_API_KEY",
    temperature: float | None = None,
    reply_tokens: int = 2000,
    timeout: float = 60.0,
    tries: int = 5,
    concurrency: int = 2,
    per_minute: float | None = None,
    max_calls: int = 50,
    max_tokens: int = 200_000,
    cache: str | None = None,
) -> None:
    """Writes the instruction bank of a task (Section 4.1): asked for, checked, ranked by clarity and concision.

    A description is refused if it lacks a slot, is a near-duplicate of another (half of their words or more are the
    same), or contains a subject, target or prompt of a test record: test records serve for nothing else. The same
    command again takes the replies from the cache. The key comes from the environment.

    Args:
        task: Name of the task.
        model: As the server calls it, or local:NAME for a local model (tiny, a folder, a hub id).
        n: Descriptions to be written.
        keep: Best ones to be kept for training, one of them held out.
        unseen: Further ones to be kept, for the transfer to unseen instructions.
        source: Where the task's records are: tiny, a file, a folder or a hub id.
        about: What the task edits, in a sentence or two; the tasks that ship have their own.
        out: File of the bank; outputs/instructions/TASK.yaml by default.
        overwrite: Let the new bank take the place of one that is there.
        judge: Let the model grade clarity and concision too; by default a measure of the text alone ranks.
        seed: Of the questions, and of which descriptions are for training, held out and unseen.
        base_url: Address of a server that speaks OpenAI's protocol (vLLM, Ollama, …); OpenAI's own by default.
        key_env: Environment variable that holds the key.
        temperature: Of sampling; the model's default if not given.
        reply_tokens: Longest reply, in tokens.
        timeout: Seconds to wait for a reply.
        tries: Tries of one question when the server is busy, fails or drops the connection.
        concurrency: Questions at once.
        per_minute: Questions a minute, at most.
        max_calls: Hard cap on calls, further tries included.
        max_tokens: Hard cap on tokens of questions and replies.
        cache: Folder of replies; instructions/ in the project's cache folder by default.
    """
    from instructedit.writing import setup
    from instructedit.writing.generate import Plan, chosen, write, write_bank
    from instructedit.writing.ledger import Ledger

    plan = Plan(n, keep, unseen, seed, judge)
    file = setup.bank_file(task, out, overwrite)
    subject = setup.Subject.load(task, source, about, seed)
    writer = setup.writer(
        model, Ledger(max_calls, max_tokens), cache, base_url, key_env, temperature, timeout,
        reply_tokens=reply_tokens, tries=tries, concurrency=concurrency, per_minute=per_minute,
    )  # fmt: skip
    print(subject)
    try:
        written = write(subject.card, writer, subject.rules, plan)
        bank = chosen(subject.card, writer, written, plan)
    finally:
        print(f"cost: {writer.ledger}")
    write_bank(bank, file)
    print(f"{written}\n{plan.keep - 1} for training, 1 held out, {plan.unseen} unseen: {file}")


def optimize(
    task: str,
    editor: str,
    model: str,
    lm: str = "tiny",
    bank: str | None = None,
    split: Literal["train", "heldout", "unseen"] = "train",
    rounds: int = 10,
    patience: int = 2,
    revisions: int = 5,
    records: int | None = None,
    source: str = "tiny",
    about: str | None = None,
    out: str | None = None,
    overwrite: bool = False,
    work: str | None = None,
    force: bool = False,
    root: str = "mlruns",
    seed: int = 0,
    base_url: str | None = None,
    key_env: str = "OPENAI_API_KEY",
    temperature: float | None = None,
    reply_tokens: int = 2000,
    timeout: float = 60.0,
    tries: int = 5,
    concurrency: int = 2,
    per_minute: float | None = None,
    max_calls: int = 50,
    max_tokens: int = 500_000,
    cache: str | None = None,
) -> None:
    """Improves a task's descriptions by the metrics of a trial editor on validation records, until none improves.

    Each round the model sees every description's figures and failures, and proposes revisions. One is kept only if the
    paired bootstrap says better: the interval of the difference in score, a record's mean over its metrics, lies above
    0, corrected for all that the round compares. Every round is a run under one MLflow run. A search that was cut off
    goes on with the same command.

    Args:
        task: Name of the task.
        editor: The trial editor, which must read instructions: a run's or saved editor's folder, or a hub id.
        model: The writer: as the server calls it, or local:NAME for a local model (tiny, a folder, a hub id).
        lm: The model that is edited: tiny, tiny-llama, a local folder, or a hub id.
        bank: File of the bank to improve; the task's own by default.
        split: Which of its descriptions to improve; the others stay.
        rounds: At most so many.
        patience: Stop when no metric has improved for so many rounds.
        revisions: Revisions to ask for in a round.
        records: Validation records to measure with; all by default.
        source: Where the task's records are: tiny, a file, a folder or a hub id.
        about: What the task edits, in a sentence or two; the tasks that ship have their own.
        out: File of the improved bank; outputs/instructions/TASK.optimized.yaml by default. Not written if nothing
            was better.
        overwrite: Let the new bank take the place of one that is there.
        work: Folder of the search's state, ledger and figure; outputs/instructions/TASK.optimize by default.
        force: Begin anew where the folder holds a search.
        root: Folder of the MLflow store.
        seed: Of the questions, the records chosen and the bootstrap.
        base_url: Address of a server that speaks OpenAI's protocol (vLLM, Ollama, …); OpenAI's own by default.
        key_env: Environment variable that holds the key.
        temperature: Of sampling; the model's default if not given.
        reply_tokens: Longest reply, in tokens.
        timeout: Seconds to wait for a reply.
        tries: Tries of one question when the server is busy, fails or drops the connection.
        concurrency: Questions at once.
        per_minute: Questions a minute, at most.
        max_calls: Hard cap on calls, further tries and those before a resumption included.
        max_tokens: Hard cap on tokens of questions and replies, likewise.
        cache: Folder of replies; instructions/ in the project's cache folder by default.
    """
    from pathlib import Path

    import instructedit as ie
    from instructedit.writing import setup
    from instructedit.writing.generate import write_bank
    from instructedit.writing.ledger import Ledger
    from instructedit.writing.optimize import Optimizer, Search
    from instructedit.writing.trial import EditorTrial

    search = Search(rounds, patience, revisions, split, seed)
    file = setup.bank_file(task, out, overwrite, ".optimized")
    folder = Path(work or f"outputs/instructions/{task}.optimize")
    subject = setup.Subject.load(task, source, about, seed)
    known = ie.InstructionBank.load(bank) if bank else ie.InstructionBank.for_task(task)
    if force:
        for name in ("state.json", "ledger.json"):
            (folder / name).unlink(missing_ok=True)
    frozen = ie.FrozenLM.from_pretrained(lm)
    validation = ie.load_records(task, source, "val")[0]
    trial = EditorTrial(frozen, ie.load_editor(editor, frozen), validation, records, seed)
    ledger = Ledger.open(max_calls, max_tokens, folder / "ledger.json")
    writer = setup.writer(
        model, ledger, cache, base_url, key_env, temperature, timeout,
        reply_tokens=reply_tokens, tries=tries, concurrency=concurrency, per_minute=per_minute,
    )  # fmt: skip
    print(subject)
    optimizer = Optimizer(subject.card, known, writer, subject.rules, trial, search, folder, Path(root))
    try:
        found = optimizer.run()
    finally:
        print(f"cost: {writer.ledger}")
    setup.show_rounds(optimizer)
    if not optimizer.improved:
        print("no revision was better; the bank stands as it is")
        return
    write_bank(found, file)
    print(f"improved bank: {file}")


main = {"generate": generate, "optimize": optimize}
