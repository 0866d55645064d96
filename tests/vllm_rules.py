"""The rules of vLLM's V1 scheduler (0.32; no asynchronous scheduling, draft models and connectors) in plain Python.

Written from its documented behavior (docs/design/prefix_caching.md, the descriptions of `SchedulerConfig`'s fields, and
docstrings of vllm/v1/core), with lists and dictionaries instead of arrays: slow, and easy to read beside those.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Block:
    number: int
    holders: int = 0
    content: tuple[int, ...] | None = None


@dataclass
class Request:
    """tokens: those known so far; answer: those that the model will say; proposed: tokens to verify besides."""

    name: int
    tokens: list[int]
    answer: list[int]
    priority: int = 0
    computed: int = 0
    proposed: int = 0
    blocks: list[Block] = field(default_factory=list)

    @property
    def rank(self) -> tuple[int, int]:
        return self.priority, self.name


@dataclass
class Rules:
    max_num_seqs: int
    max_num_batched_tokens: int
    block_size: int
    num_blocks: int
    chunked: bool = True
    caching: bool = True
    threshold: int = 0
    by_priority: bool = False
    reserve_full: bool = True
    watermark: float = 0.0

    def __post_init__(self) -> None:
        self.free = [Block(number) for number in range(self.num_blocks)]  # the first is taken first
        self.cache: dict[tuple[int, ...], list[Block]] = {}
        self.running: list[Request] = []
        self.waiting: list[Request] = []
        self.added: set[int] = set()

    def add(self, request: Request) -> None:
        self.added.add(request.name)
        self.waiting.append(request)
        self._sort()

    def _sort(self) -> None:
        if self.by_priority:
            self.waiting.sort(key=lambda request: request.rank)

    def blocks_of(self, tokens: int) -> int:
        return -(-tokens // self.block_size)

    def step(self) -> tuple[list[tuple[int, int, int]], list[int]]:
        """(request, tokens before, tokens now) of each row, and who was preempted; then the step is done."""
        planned: dict[int, int] = {}
        preempted: list[int] = []
        budget = self.max_num_batched_tokens
        most = self.threshold if self.threshold and len(self.running) + len(self.waiting) > 1 else budget
        place = 0
        while place < len(self.running) and budget > 0:
            request = self.running[place]
            tokens = min(len(request.tokens) + request.proposed - request.computed, most, budget)
            needed = self.blocks_of(request.computed + tokens) - len(request.blocks)
            gone = False
            while needed > len(self.free) and not gone:
                last = max(self.running, key=lambda r: r.rank) if self.by_priority else self.running[-1]
                if self.running.index(last) < place:
                    place -= 1
                self.running.remove(last)
                budget += planned.pop(last.name, 0)
                self._release(last)
                last.computed = last.proposed = 0
                self.waiting.insert(0, last)
                self._sort()
                preempted.append(last.name)
                gone = last is request
            if gone:
                break
            self._take(request, needed)
            planned[request.name] = tokens
            budget -= tokens
            place += 1
        for request in self.running:
            if request.name in planned:
                self._name(request, min(request.computed + planned[request.name], len(request.tokens)))
        while not preempted and self.waiting and budget > 0 and len(self.running) < self.max_num_seqs:
            request = self.waiting[0]
            found = self._found(request)
            request.computed = len(found) * self.block_size
            tokens = min(len(request.tokens) - request.computed, most)
            if tokens > budget and not self.chunked:
                break
            tokens = min(tokens, budget)
            kept_free = int(self.watermark * self.num_blocks) if self.running else 0
            idle = sum(block.holders == 0 for block in found)
            whole = len(request.tokens) if self.reserve_full else request.computed + tokens
            if self.blocks_of(whole) - len(found) + idle + kept_free > len(self.free):
                request.computed = 0
                break
            self.waiting.pop(0)
            for block in found:
                if block.holders == 0:
                    self.free.remove(block)
                block.holders += 1
            request.blocks = list(found)
            self._take(request, self.blocks_of(request.computed + tokens) - len(found))
            self.running.append(request)
            planned[request.name] = tokens
            budget -= tokens
            self._name(request, request.computed + tokens)
        rows = [(r.name, r.computed, planned[r.name]) for r in self.running if r.name in planned]
        for request in list(self.running):
            request.computed += planned.get(request.name, 0)
            if request.name in planned and request.computed >= len(request.tokens):
                verified = request.computed - len(request.tokens)
                kept = 1 + min(verified, self.agreed(request))
                request.tokens += request.answer[:kept]
                del request.answer[:kept]
                request.computed, request.proposed = len(request.tokens) - 1, 0
                if not request.answer:
                    self.running.remove(request)
                    self._release(request)
        return rows, preempted

    def agreed(self, request: Request) -> int:
        """How many proposed tokens the model would say, too, where there are as many: by the request and the place."""
        return (3 * request.name + len(request.tokens)) % 4

    def propose(self, most: int) -> None:
        """For requests that lack their last token alone; never beyond their end."""
        for request in self.running:
            wanted = (request.name + len(request.tokens)) % (most + 1)
            waits_for_last = request.computed == len(request.tokens) - 1
            request.proposed = min(wanted, len(request.answer) - 1) if waits_for_last else 0

    def _content(self, request: Request, index: int) -> tuple[int, ...]:
        return tuple(request.tokens[: (index + 1) * self.block_size])

    def _found(self, request: Request) -> list[Block]:
        """The longest prefix in whole blocks; at least one token is left to compute."""
        found: list[Block] = []
        while self.caching and (len(found) + 1) * self.block_size < len(request.tokens):
            same = self.cache.get(self._content(request, len(found)))
            if not same:
                break
            found.append(same[0])
        return found

    def _take(self, request: Request, count: int) -> None:
        for _ in range(max(0, count)):
            block = self.free.pop(0)
            if block.content is not None:
                self.cache[block.content].remove(block)
                block.content = None
            block.holders = 1
            request.blocks.append(block)

    def _name(self, request: Request, computed: int) -> None:
        for index in range(computed // self.block_size if self.caching else 0):
            block = request.blocks[index]
            if block.content is None:
                block.content = self._content(request, index)
                self.cache.setdefault(block.content, []).append(block)

    def _release(self, request: Request) -> None:
        """From the last block on; those with content go to the end of the queue, the others to its front."""
        blank: list[Block] = []
        for block in reversed(request.blocks):
            block.holders -= 1
            if block.holders == 0:
                (self.free if block.content is not None else blank).append(block)
        self.free[:0] = blank
        request.blocks = []
