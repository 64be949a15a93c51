"""MMLU (github.com/hendrycks/test): 57 subjects in English.

There are two protocols: `MMLU` asks as Hendrycks' code does, `MODELLINK` as ModelLink 1.1.
"""

from dataclasses import replace

from glm3cli.config.evaluation import Protocol
from glm3cli.evals.suite import Suite

# The subjects of each category, from the subject table of github.com/hendrycks/test.
_STEM = """
abstract_algebra astronomy college_biology college_chemistry college_computer_science
college_mathematics college_physics computer_security conceptual_physics electrical_engineering
elementary_mathematics high_school_biology high_school_chemistry high_school_computer_science
high_school_mathematics high_school_physics high_school_statistics machine_learning
"""
_HUMANITIES = """
formal_logic high_school_european_history high_school_us_history high_school_world_history
international_law jurisprudence logical_fallacies moral_disputes moral_scenarios philosophy
prehistory professional_law world_religions
"""
_SOCIAL_SCIENCES = """
econometrics high_school_geography high_school_government_and_politics high_school_macroeconomics
high_school_microeconomics high_school_psychology human_sexuality professional_psychology
public_relations security_studies sociology us_foreign_policy
"""
_OTHER = """
anatomy business_ethics clinical_knowledge college_medicine global_facts human_aging management
marketing medical_genetics miscellaneous nutrition professional_accounting professional_medicine
virology
"""

MMLU = Suite(
    name="mmlu",
    protocol="logits",
    split="test",
    columns=None,
    header="The following are multiple choice questions (with answers) about {subject}.\n\n",
    question="{text}\n",
    cue="Answer:",
    gap=" ",
    titles={},
    categories={
        "STEM": _STEM.split(),
        "humanities": _HUMANITIES.split(),
        "social sciences": _SOCIAL_SCIENCES.split(),
        "other": _OTHER.split(),
    },
    rest="other",
    published=(
        "Published for ChatGLM3-6B-Base: 61.4 (THUDM, 0-shot, with prompts that aren't public).",
        "Published by ModelLink 1.1: 61.5 (5-shot, by --protocol modellink, where what has no "
        "letter counts as wrong).",
    ),
)

# ModelLink's text differs in its whitespace: two spaces before the subject, one line break after
# the header and between shots, and an empty line only before the question that is asked.
MODELLINK = replace(
    MMLU,
    protocol="modellink",
    header="The following are multiple choice questions (with answers) about  {subject}.\n",
    shot_end="\n",
    last_shot_end="\n\n",
    judge="text",
)


def suite_of(protocol: Protocol) -> Suite:
    """Returns the suite that asks MMLU's questions by `protocol`."""
    return MODELLINK if protocol == "modellink" else MMLU
