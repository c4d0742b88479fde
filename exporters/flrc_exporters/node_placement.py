"""Where onnxruntime puts the nodes of a graph: on an accelerator, or elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flrc_runtime.errors import FlrcError
from flrc_runtime.providers import Provider, add_provider
from flrc_runtime.sessions import loading_error


@dataclass(frozen=True)
class Placement:
    """Where the nodes of one graph run.

    Args:
        placed: Number of nodes on the accelerator.
        elsewhere: Names and operators of the others.
    """

    placed: int
    elsewhere: tuple[tuple[str, str], ...]

    @property
    def nodes(self) -> int:
        """Return the number of all nodes."""
        return self.placed + len(self.elsewhere)


def open_placed(
    graph: Path, provider: Provider, entries: Mapping[str, str] | None = None
) -> tuple[Any, Placement]:
    """Open a graph and look where its nodes went.

    Args:
        graph: Its file.
        provider: Of the accelerator.
        entries: More of the session's configuration.

    Returns:
        The session, and where its nodes run.

    Raises:
        FlrcError: The provider refuses the graph.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    for key, value in {"session.record_ep_graph_assignment_info": "1", **(entries or {})}.items():
        options.add_session_config_entry(key, value)
    add_provider(options, provider)
    try:
        session = onnxruntime.InferenceSession(str(graph), options)
    except Exception as error:  # onnxruntime's errors share no base of their own
        reason = loading_error(error, graph.parent)
        raise FlrcError(f"{provider.name} refuses {graph.name}: {reason}") from error
    placed, elsewhere = 0, []
    for part in session.get_provider_graph_assignment_info():
        nodes = part.get_nodes()
        if part.ep_name == provider.name:
            placed += len(nodes)
        else:
            elsewhere += [(node.name, node.op_type) for node in nodes]
    return session, Placement(placed, tuple(elsewhere))
