"""Captions are written for images that have none, or too short ones. The report's "context" experiment trains on such.

    captioner = OpenAICaptioner("captions_gpt4o.sqlite")            # or OpenAIBatchCaptioner, or CoCaCaptioner
    report = captioner.describe(dataset, "captions.json", count=5)  # says what it would cost, and sends nothing
    report = captioner.describe(dataset, "captions.json", count=5, confirm=True)
    print(report)                                                   # what is missing, and how to go on

`OpenAICaptioner` asks a vision model behind OpenAI's API, or any server that speaks it, several images at a time;
`OpenAIBatchCaptioner` sends the same requests through the Batch API, for large sets; `CoCaCaptioner` runs open_clip's
CoCa on this machine. All keep every answer in a file, ask only for what it lacks, and write a captions file for
`taco_nb.data.CaptionedFolder` once it is complete, so the same call starts, resumes and finishes the work.
`ask_keywords` has a language model choose the keywords of captions. `taco-nb caption` and `taco-nb keywords` do all of this
from a shell.
"""

from taco_nb.tools.captions.batch import OpenAIBatchCaptioner
from taco_nb.tools.captions.captioner import Captioner, Estimate, Report, ServiceError, open_pictures
from taco_nb.tools.captions.coca import CoCaCaptioner
from taco_nb.tools.captions.keywords import ask_keywords
from taco_nb.tools.captions.openai_captioner import OpenAICaptioner
from taco_nb.tools.captions.service import Price

__all__ = [
    "Captioner",
    "CoCaCaptioner",
    "Estimate",
    "OpenAIBatchCaptioner",
    "OpenAICaptioner",
    "Price",
    "Report",
    "ServiceError",
    "ask_keywords",
    "open_pictures",
]
