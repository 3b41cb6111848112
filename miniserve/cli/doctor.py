"""`miniserve doctor`: what agents make a running server compute again, in sentences, from GET /v1/doctor."""

from argparse import Namespace

from miniserve.cli.client import ApiClient
from miniserve.cli.flags import api_key
from miniserve.cli.screen import clean
from miniserve.monitor.views import Card

PATIENCE_SECONDS = 10.0
MOST_CAUSES = 5


def doctor(args: Namespace) -> int:
    """Print the report of the server at `url`; the exit code. Raises `ConfigError`."""
    report = ApiClient(args.url, api_key(args), PATIENCE_SECONDS).get("/doctor")
    print("\n".join(line for one in report["data"] for line in _lines(one)) or "No turn has come yet.")
    return 0


def _lines(one: Card) -> list[str]:
    share = one["computed_tokens"] / max(one["prompt_tokens"], 1)
    counts = f"{one['turns']:,} turns, {share:.0%} of {one['prompt_tokens']:,} prompt tokens computed"
    lines = [f"{clean(one['client'])}: {counts}{'' if one['causes'] else ', and no prompt had changed'}"]
    for cause in one["causes"][:MOST_CAUSES]:
        where = {"tools": "the tools", "system": "the system prompt"}.get(
            cause["where"], f"the {cause['where']} messages"
        )
        lines.append(f"  {cause['share']:.0%} of that because of {where}: {cause['says']} ({cause['turns']:,} turns)")
        lines.append(f"    {cause['advice']}")
    return lines
