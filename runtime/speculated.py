"""What speculative decoding brought a request: counts for statistics and the request log. No torch, no Numba."""

from __future__ import annotations

from typing import NamedTuple


class Speculated(NamedTuple):
    """What was proposed for a request, or for all.

    drafts           steps that verified proposals
    draft_tokens     proposed, and verified
    accepted_tokens  of these, in a row from the first of a step, what the model said, too
    """

    drafts: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0

    def logged(self, completion_tokens: int) -> dict[str, int]:
        """As the request log has it: with the steps that brought an answer of so many tokens all after its first.

        A step brings its accepted tokens and one more. Where a stop token or a stop string cut one short there were
        more steps than that gives, and at least those that verified proposals.
        """
        steps = max(completion_tokens - 1 - self.accepted_tokens, self.drafts)
        return {"steps": steps, **self._asdict()}


NOTHING = Speculated()
