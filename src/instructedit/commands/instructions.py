"""Descriptions of tasks, written and improved by a language model (generate, optimize)."""

from __future__ import annotations

from dataclasses import dataclass
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
    """Has a model write a task's instruction bank (Section 4.1): checked, and ranked by clarity and concision.

    A description is refused if it lacks a slot, is a near-duplicate of another (half of their words or more are the
    same), or contains a subject, target or prompt of a test record: test records serve no other purpose. The same
    command again takes the replies from the cache. The key comes from the environment.

    Args:
        task: Name of the task.
        model: Name of the model on the server, or local:NAME for a local model (tiny, a folder, a hub id).
        n: Descriptions to be written.
        keep: Best descriptions to be kept for training, one of them held out.
        unseen: Further descriptions to be kept, for the transfer to unseen instructions.
        source: Source of the task's records: tiny, a file, a folder or a hub id.
        about: What the task edits, in a sentence or two; the tasks that ship have their own.
        out: File of the bank; outputs/instructions/TASK.yaml by default.
        overwrite: Replace an existing bank.
        judge: Let the model grade clarity and concision too; by default a measure of the text alone ranks.
        seed: Seed of the questions, and of the choice of descriptions for training, held out and unseen.
        base_url: Address of a server that speaks OpenAI's protocol (vLLM, Ollama, …); OpenAI's own by default.
        key_env: Environment variable that holds the key.
        temperature: Sampling temperature; the model's default if not given.
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


@dataclass
class OptimizeCommand:
    """Improves a task's descriptions by the metrics of a trial editor on validation records, until none improves.

    Each round the model sees every description's figures and failures, and proposes revisions. One is kept only if it
    is better by the paired bootstrap: the interval of the difference in score, a record's mean over its metrics, lies
    above 0, corrected for all that the round compares. Every round is a run under one MLflow run. An interrupted search
    goes on with the same command.

    Args:
        task: Name of the task.
        editor: The trial editor, which must read instructions: a run's or saved editor's folder, or a hub id.
        model: The writer: its name on the server, or local:NAME for a local model (tiny, a folder, a hub id).
        lm: The model that is edited: tiny, tiny-llama, a local folder, or a hub id.
        bank: File of the bank to improve; the task's own by default.
        split: Which of its descriptions to improve; the others stay.
        rounds: Maximum number of rounds.
        patience: Number of rounds without an improvement after which to stop.
        revisions: Revisions to ask for in a round.
        records: Validation records to measure with; all by default.
        source: Source of the task's records: tiny, a file, a folder or a hub id.
        about: What the task edits, in a sentence or two; the tasks that ship have their own.
        out: File of the improved bank; outputs/instructions/TASK.optimized.yaml by default. Not written if nothing
            was better.
        overwrite: Replace an existing bank.
        work: Folder of the search's state, ledger and figure; outputs/instructions/TASK.optimize by default.
        force: Begin anew even if the folder holds a search.
        root: Folder of the MLflow store.
        seed: Seed of the questions, the choice of records and the bootstrap.
        base_url: Address of a server that speaks OpenAI's protocol (vLLM, Ollama, …); OpenAI's own by default.
        key_env: Environment variable that holds the key.
        temperature: Sampling temperature; the model's default if not given.
        reply_tokens: Longest reply, in tokens.
        timeout: Seconds to wait for a reply.
        tries: Tries of one question when the server is busy, fails or drops the connection.
        concurrency: Questions at once.
        per_minute: Questions a minute, at most.
        max_calls: Hard cap on calls, further tries and those before a resumption included.
        max_tokens: Hard cap on tokens of questions and replies, likewise.
        cache: Folder of replies; instructions/ in the project's cache folder by default.
    """

    task: str
    editor: str
    model: str
    lm: str = "tiny"
    bank: str | None = None
    split: Literal["train", "heldout", "unseen"] = "train"
    rounds: int = 10
    patience: int = 2
    revisions: int = 5
    records: int | None = None
    source: str = "tiny"
    about: str | None = None
    out: str | None = None
    overwrite: bool = False
    work: str | None = None
    force: bool = False
    root: str = "mlruns"
    seed: int = 0
    base_url: str | None = None
    key_env: str = "OPENAI_API_KEY"
    temperature: float | None = None
    reply_tokens: int = 2000
    timeout: float = 60.0
    tries: int = 5
    concurrency: int = 2
    per_minute: float | None = None
    max_calls: int = 50
    max_tokens: int = 500_000
    cache: str | None = None

    def __call__(self) -> None:
        """Runs the command."""
        from pathlib import Path

        import instructedit as ie
        from instructedit.writing import setup
        from instructedit.writing.generate import write_bank
        from instructedit.writing.ledger import Ledger
        from instructedit.writing.optimize import Optimizer, Search
        from instructedit.writing.trial import EditorTrial

        search = Search(self.rounds, self.patience, self.revisions, self.split, self.seed)
        file = setup.bank_file(self.task, self.out, self.overwrite, ".optimized")
        folder = Path(self.work or f"outputs/instructions/{self.task}.optimize")
        subject = setup.Subject.load(self.task, self.source, self.about, self.seed)
        known = ie.InstructionBank.load(self.bank) if self.bank else ie.InstructionBank.for_task(self.task)
        if self.force:
            for name in ("state.json", "ledger.json"):
                (folder / name).unlink(missing_ok=True)
        frozen = ie.FrozenLM.from_pretrained(self.lm)
        validation = ie.load_records(self.task, self.source, "val")[0]
        trial = EditorTrial(frozen, ie.load_editor(self.editor, frozen), validation, self.records, self.seed)
        ledger = Ledger.open(self.max_calls, self.max_tokens, folder / "ledger.json")
        writer = setup.writer(
            self.model, ledger, self.cache, self.base_url, self.key_env, self.temperature, self.timeout,
            reply_tokens=self.reply_tokens, tries=self.tries, concurrency=self.concurrency, per_minute=self.per_minute,
        )  # fmt: skip
        print(subject)
        optimizer = Optimizer(subject.card, known, writer, subject.rules, trial, search, folder, Path(self.root))
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


RENAMED = {"fresh": "force"}
main = {"generate": generate, "optimize": OptimizeCommand}
