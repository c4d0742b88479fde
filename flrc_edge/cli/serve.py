"""``flrc-edge serve``: a bundle behind HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from flrc_edge.cli.decoding import check_stage_options, policy_of, stage_options
from flrc_edge.cli.loading import provider_option
from flrc_edge.errors import UsageError

if TYPE_CHECKING:
    from flrc_runtime.policy import Policy


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", default=8080, show_default=True, help="Port to listen on; 0 for a free one.")
@click.option("--name", help="Name that clients call the model by.  [default: that of the bundle]")
@click.option(
    "--api-key-file",
    type=click.Path(path_type=Path),
    help="File with the key that clients must send as Bearer.",
)
@click.option("--public", is_flag=True, help="Listen to other machines without a key.")
@click.option("--parallel", default=4, show_default=True, help="Answers at a time, token by token in turn.")
@click.option("--queue", default=64, show_default=True, help="Requests that may wait for a place.")
@click.option("--max-tokens", type=int, default=None, metavar="N", help="Most tokens of an answer.")
@click.option("--temperature", type=float, default=0.0, show_default=True, help="Where a request names none.")
@stage_options
@click.option("--context", type=int, default=None, metavar="TOKENS", help="Prompt and answer together.")
@click.option("--threads", type=int, default=None, metavar="N", help="Of one operator.")
@provider_option
def command(
    bundle: Path,
    host: str,
    port: int,
    name: str | None,
    api_key_file: Path | None,
    public: bool,
    parallel: int,
    queue: int,
    max_tokens: int | None,
    temperature: float,
    stage: int | None,
    ms_per_token: float | None,
    mean_keep: float | None,
    context: int | None,
    threads: int | None,
    providers: tuple[str, ...],
) -> None:
    """Serve BUNDLE to clients of OpenAI's API.

    \b
    flrc-edge serve smollm2-onnx
    curl http://127.0.0.1:8080/v1/chat/completions -H 'content-type: application/json' \\
      -d '{"model": "smollm2-135m", "messages": [{"role": "user", "content": "Hello"}]}'
    """  # noqa: D301 (click reads the backspace character)
    from flrc_runtime import FixedStage, Sampling, load
    from flrc_runtime.policy import checked_stage, prompt_stage
    from flrc_runtime.server.app import Limits, Server
    from flrc_runtime.server.run import check_host, read_key, run

    check_stage_options(stage=stage, ms_per_token=ms_per_token, mean_keep=mean_keep)
    if not 0 <= port <= 65535:
        raise UsageError(f"port {port} is not from 0 to 65535")
    Sampling(temperature=temperature)
    limits = Limits(parallel=parallel, queue=queue, max_tokens=max_tokens)
    hosts = check_host(host, protected=api_key_file is not None, public=public)
    key = None if api_key_file is None else read_key(api_key_file)
    model = load(bundle, context=context, threads=threads, providers=providers)

    def policy() -> Policy | None:  # one an answer: they count its tokens
        return policy_of(model, stage, ms_per_token, mean_keep)

    checked_stage(
        prompt_stage(policy() or FixedStage(0)), model.num_stages
    )  # refused now, not at the first request
    server = Server(
        model,
        name=name,
        limits=limits,
        api_key=key,
        hosts=hosts,
        policy=policy,
        temperature=temperature,
    )
    run(server, host=host, port=port)
