"""The chats of a data parallel group become texts on its first rank."""

from collections.abc import Mapping, Sequence
from datetime import datetime

from moempi.engine.chat import ChatText, render_chats, template_day
from moempi.engine.deployment import Deployment
from moempi.errors import MoempiError
from moempi.storage.prompts import Prompt


class GroupChats:
    """Renders the chats of a data parallel group on its first rank, so that all its ranks have the same texts.

    Making it is collective over all ranks, and so is `free`; both block.
    """

    def __init__(self, deployment: Deployment) -> None:
        world, coords, ranks = deployment.world, deployment.rank_layout.coords, deployment.rank_layout.ranks
        self._deployment = deployment
        self._start = datetime.fromisoformat(world.comm.bcast(datetime.now().isoformat()))
        self._group = ranks.Split(coords.data if coords.stage == 0 else world.size, coords.tensor)

    def render(self, own: Sequence[Prompt]) -> Mapping[int, ChatText]:
        """The texts of the chats among the `own` prompts of this rank's group, by the index of the prompt.

        Collective over the group, blocks. A MoempiError of its first rank is raised on all its ranks.
        """
        rendered = self._group.bcast(self._render(own) if self._group.rank == 0 else None)
        if isinstance(rendered, MoempiError):
            raise rendered
        of_group: Mapping[int, ChatText] = rendered
        return of_group

    def free(self) -> None:
        """Free the communicator."""
        self._group.Free()

    def _render(self, own: Sequence[Prompt]) -> Mapping[int, ChatText] | MoempiError:
        deployment, section = self._deployment, self._deployment.job.chat
        try:
            return render_chats(
                own,
                deployment.weights.chat,
                deployment.tokenizer,
                section=section,
                today=template_day(section, self._start),
                on_chat=lambda: deployment.world.alive(deployment.world.where),
            )
        except MoempiError as error:
            return error
