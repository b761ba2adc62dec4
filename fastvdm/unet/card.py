"""The model card (a jinja template) that ``save_pretrained`` and ``push_to_hub`` write."""

PAPER = "https://arxiv.org/abs/2204.03458"  # Ho et al. 2022

MARK = "written by the Python package `fastvdm`"  # a card with this line may be overwritten
OUTPUT = {True: "sample.mp4", False: "sample.npy"}  # key: pixels (True) or latents (False)

CARD = """---
{{ card_data }}
---

# {{ repo_id | default("A video diffusion model", true) }}

A factorized space-time 3D U-Net ([Ho et al. 2022, Video Diffusion Models]({{ paper_url }})),
written by the Python package `fastvdm`. config.json holds the arguments of its `UNet3D`
{%- if told %}, settings.json how it is sampled{% endif %}.

```python
{% if conditional %}import torch

{% endif %}from fastvdm import UNet3D
from fastvdm.diffusion import sample
from fastvdm.video import write_video

model = UNet3D.from_pretrained("{{ repo_id | default("this folder", true) }}")
video = {{ call }}
write_video("{{ file }}", video[0], fps={{ fps }})
```
{% if told %}
| setting | |
|---|---|
{% for name, value in told.items() if name != "betas" and value is not none %}
{{- "| %s | %s |\n" % (name, value) }}
{%- endfor %}{% endif %}
The data it was trained on, its quality and its uses are not known to the package: whoever publishes
it should say so here.
"""
