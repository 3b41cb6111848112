"""A model for mini-swe-agent that keeps to a script: it gets its next command as the only value its tool may be called
with. The agent, its prompts, its shell and its client stay as they are; a random model would run random commands.
"""

import litellm
from minisweagent.models.litellm_model import BASH_TOOL, LitellmModel

SCRIPT = [
    "printf 'one\\ntwo\\n' > notes.txt",
    "grep -c o notes.txt",
    "echo COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT && cat notes.txt",
]


class ScriptedModel(LitellmModel):
    """`--model-class scripted.ScriptedModel`."""

    def _query(self, messages, **kwargs):
        said = sum(message["role"] == "assistant" for message in messages)
        command = {"type": "string", "const": SCRIPT[said]}
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
