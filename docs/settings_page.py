"""Print docs/settings.md, the page of all settings: python docs/settings_page.py > docs/settings.md"""

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the settings are those of this checkout

from pipeline.cli.settings import REQUIRED, setting_sections

PAGE_HEAD = """# Settings

With this page you can look up any key of a configuration: its values, its default and its meaning. `--set KEY=VALUE` changes one
for a command, `pipeline config NAME` lists them with the values of a configuration and where each comes from. `null` means no
value. The page is made from `pipeline/config/`: `python docs/settings_page.py > docs/settings.md`.

```bash
pipeline config
pipeline config digits-lt --set backbone.epochs=10
```
"""


def settings_page() -> str:
    """Return docs/settings.md: every setting with its values, its default and its description."""
    parts = [PAGE_HEAD]
    for section in setting_sections().values():
        title = f"`{section.path}`" if section.path else "`name`"
        about = (
            re.sub(r"docs/(\w+).md", r"[\1](\1.md)", section.description)
            if section.path
            else "The top level of a file."
        )
        parts.append(f"## {title}\n\n{about}\n")
        parts.append("| key | values | default | meaning |\n|---|---|---|---|")
        for item in section.fields.values():
            default = "" if item.default is REQUIRED else f"`{item.default_text}`"
            parts.append(f"| `{item.key}` | {item.values} | {default} | {item.description} |")
        parts.append("")
    return "\n".join(parts)


if __name__ == "__main__":
    print(settings_page(), end="")
