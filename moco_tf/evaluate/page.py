"""HTML pages that open from disk: they contain their pictures and need no network.

`write` takes parts that are HTML already. `text`, `table`, `figure` and `image` make such parts; the input of `text`
and the rows of `table` may have any characters. Reports of an encoder and the pages of `moco_tf.search` consist of
these parts.
"""

import base64
import html

from moco_tf import files

PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 64rem; margin: 2rem auto; padding: 0 1rem; }}
h1 {{ font-size: 1.5rem; overflow-wrap: anywhere; }} h2 {{ font-size: 1.15rem; margin-top: 2.2rem; }}
table {{ border-collapse: collapse; }} td, th {{ padding: .2rem .8rem .2rem 0; text-align: left; }}
td.number {{ text-align: right; font-variant-numeric: tabular-nums; }}
.wide {{ max-width: 100%; }} .half {{ width: 48%; min-width: 20rem; }}
.row {{ display: flex; flex-wrap: wrap; gap: .4rem; margin-bottom: .5rem; }}
figure {{ margin: 0; width: 5.2rem; font-size: .7rem; line-height: 1.25; overflow-wrap: anywhere; }}
figure img {{ width: 4.6rem; height: 4.6rem; display: block; border: 2px solid #ccc; }}
figure.query {{ margin-right: 1rem; }} figure.query img {{ border-color: #222; }}
figure.same img {{ border-color: #2a9d4a; }} figure.other img {{ border-color: #d1495b; }}
.files {{ gap: 1rem .8rem; margin-bottom: 2rem; }}
.files figure {{ width: 10rem; max-width: 45%; margin: 0; font-size: .8rem; line-height: 1.35; }}
.files img, .files .missing {{ box-sizing: border-box; width: 100%; height: 10rem; object-fit: contain; }}
.files img {{ background: #f4f4f4; }}
.files .missing {{ display: flex; align-items: center; justify-content: center; border: 2px dashed #ccc; }}
.files figcaption {{ padding-top: .2rem; }} figcaption span {{ display: block; }}
figcaption .mark {{ color: #17692e; font-weight: 600; }}
.note {{ color: #666; overflow-wrap: anywhere; }}
</style></head><body>
<h1>{title}</h1>
{body}
</body></html>
"""


def write(path, title, parts):
    """Writes a page in one step. title: any text; parts: a list of HTML."""
    files.write_text(path, PAGE.format(title=text(title), body="\n".join(parts)))


def text(value):
    """Returns any text as HTML, also a file name that is not valid text or contains a line break."""
    return html.escape(files.printable(value))


def table(heads, rows):
    """Returns an HTML table; heads: HTML; rows: of any values."""
    head = "".join(f"<th>{cell}</th>" for cell in heads)
    body = "".join("<tr>" + "".join(f"<td>{text(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def figure(picture, caption, kind, alternative):
    """Returns a captioned picture. picture, caption: HTML; kind: a style class; alternative: HTML, the tooltip."""
    return f'<figure class="{kind}" title="{alternative}">{picture}<figcaption>{caption}</figcaption></figure>'


def image(encoded, alternative, attributes=""):
    """Returns an image that the page contains. encoded: bytes of a PNG or a JPEG; alternative: HTML."""
    kind = "jpeg" if encoded.startswith(b"\xff\xd8") else "png"
    content = base64.b64encode(encoded).decode()
    return f'<img{attributes} alt="{alternative}" src="data:image/{kind};base64,{content}">'
