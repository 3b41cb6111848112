"""The content blocks of /v1/messages. What a model that reads text cannot be given stands as text, or not at all."""

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag

from miniserve.text.messages import Body, Json, Text, TextOr, one_of, readable, text_or

SERVER_BLOCKS = re.compile(
    "server_tool_use|mcp_(tool_use|tool_result|tool_listing)|container_upload|"
    "(web_search|web_fetch|advisor|(bash_|text_editor_)?code_execution|tool_search)_tool_result|tool_(addition|removal)"
)
"""What tools of Anthropic's servers leave in a history: left out."""


class TextBlock(Body):
    type: Literal["text"]
    text: Text


class ThinkingBlock(Body):
    type: Literal["thinking"]
    thinking: Text


class ToolUseBlock(Body):
    type: Literal["tool_use"]
    id: Annotated[Text, Field(min_length=1)]
    name: Text
    input: Json | None


class ToolReferenceBlock(Body):
    type: Literal["tool_reference"]
    tool_name: Text


def as_text(block: Any) -> Any:
    """A block of a kind that chats have no word for, as text or as nothing."""
    kind, source = (block.get("type"), block.get("source")) if isinstance(block, dict) else (None, None)
    if kind == "document" and isinstance(source, dict) and source.get("type") in ("text", "content"):
        said = source.get("data", source.get("content"))
        texts = [block.get("title"), block.get("context"), *([said] if isinstance(said, str) else _texts_in(said))]
    elif kind == "search_result":
        texts = [block.get("title"), block.get("source"), *_texts_in(block.get("content"))]
    elif kind == "compaction":
        texts = [block.get("content")]
    elif isinstance(kind, str) and SERVER_BLOCKS.fullmatch(kind):
        return {"type": "text", "text": ""}
    else:
        return readable(block)
    return {"type": "text", "text": "\n".join(text for text in texts if isinstance(text, str))}


def _texts_in(blocks: Any) -> list[Any]:
    return [item.get("text") for item in blocks if isinstance(item, dict)] if isinstance(blocks, list) else []


KIND_OF_BLOCK = Discriminator(lambda block: f"<{block['type']}>")
TextTag = Annotated[TextBlock, Tag("<text>")]
ReferenceTag = Annotated[ToolReferenceBlock, Tag("<tool_reference>")]
ResultBlock = Annotated[
    TextTag | ReferenceTag,
    KIND_OF_BLOCK,
    one_of("Content blocks", ["text", "tool_reference"]),
    BeforeValidator(as_text),
]
ResultBlocks = Annotated[list[ResultBlock], Field(fail_fast=True)]


class ToolResultBlock(Body):
    type: Literal["tool_result"]
    tool_use_id: Annotated[Text, Field(min_length=1)]
    content: Annotated[TextOr[ResultBlocks], text_or("This must be a string or a list of text blocks")] | None = None
    is_error: bool | None = None


Block = Annotated[
    TextTag
    | ReferenceTag
    | Annotated[ThinkingBlock, Tag("<thinking>")]
    | Annotated[ToolUseBlock, Tag("<tool_use>")]
    | Annotated[ToolResultBlock, Tag("<tool_result>")],
    KIND_OF_BLOCK,
    one_of("Content blocks", ["text", "thinking", "tool_use", "tool_result", "tool_reference"]),
    BeforeValidator(as_text),
]
Blocks = Annotated[list[Block], Field(fail_fast=True)]
