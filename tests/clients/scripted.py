"""Models for mini-swe-agent that keep to a script: a grammar makes what comes next in it the only possible answer. The
agent, its prompts, its shell and its client stay as they are; a random model would run random commands.
"""

import litellm
from minisweagent.models.litellm_model import BASH_TOOL, LitellmModel
from minisweagent.models.litellm_textbased_model import LitellmTextbasedModel

SCRIPT = [
    "printf 'one\\ntwo\\n' > notes.txt",
    "grep -c o notes.txt",
    "echo COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT && cat notes.txt",
]


def next_command(messages):
    """What the script says at this point of a conversation."""
    return SCRIPT[sum(message["role"] == "assistant" for message in messages)]


class ScriptedModel(LitellmModel):
    """`--model-class scripted.ScriptedModel`: the command is the only value with which the tool can be called."""

    def _query(self, messages, **kwargs):
        command = {"type": "string", "const": next_command(messages)}
        parameters = {**BASH_TOOL["function"]["parameters"], "properties": {"command": command}}
        tool = {**BASH_TOOL, "function": {**BASH_TOOL["function"], "parameters": parameters}}
        return litellm.completion(
            model=self.config.model_name,
            messages=messages,
            tools=[tool],
            tool_choice="required",
            parallel_tool_calls=False,
            **(self.config.model_kwargs | kwargs),
        )


class ScriptedTextModel(LitellmTextbasedModel):
    """`--model-class scripted.ScriptedTextModel`: the command stands in a text, as mini_textbased.yaml wants it."""

    def _query(self, messages, **kwargs):
        answer = f"THOUGHT: as the script says.\n\n```mswea_bash_command\n{next_command(messages)}\n```"
        only = {"structured_outputs": {"choice": [answer]}}
        return super()._query(messages, extra_body=only, **kwargs)
