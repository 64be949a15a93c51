"""The chat formats by their names in the table of members."""

from glm3cli.config.family.members import FormatName
from glm3cli.data.tokens.formats.base import ChatFormat
from glm3cli.data.tokens.formats.code import Comments
from glm3cli.data.tokens.formats.roles import ChatGLM3, CodeGeeX4, Glm4, Glm4Later, GlmZ1
from glm3cli.data.tokens.formats.rounds import Rounds

FORMATS: dict[FormatName, ChatFormat] = {
    "chatglm2": Rounds(),
    "codegeex2": Comments(),
    "chatglm3": ChatGLM3(),
    "glm4": Glm4(),
    "codegeex4": CodeGeeX4(),
    "glm4-0414": Glm4Later(),
    "glm-z1": GlmZ1(),
}
