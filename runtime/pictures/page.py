"""Web pages of one file: pictures inside, nothing to fetch, no script."""
import base64
import html
import io

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1200px; margin: 2em auto; padding: 0 1em; color: #1b1b1b;
background: #fff; } h1 { font-size: 1.5em; } h2 { font-size: 1.15em; margin-top: 2em; border-top: 1px solid #ddd;
padding-top: .8em; } img { max-width: 100%; height: auto; display: block; margin: .5em 0; } table { border-collapse:
collapse; margin: .5em 0; } th, td { text-align: left; padding: .15em 1.2em .15em 0; vertical-align: top; } th {
font-weight: 600; border-bottom: 1px solid #bbb; } td { border-bottom: 1px solid #eee; overflow-wrap: anywhere; }
.side-by-side { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 480px), 1fr)); gap: 0 2em;
align-items: start; } .note { background: #fff4d6; padding: .4em .8em; }
"""


def printable(value) -> str:
    """`value` with escapes for what UTF-8 cannot write, as a file's name may hold it."""
    return str(value).encode("utf-8", "backslashreplace").decode("utf-8")


def label(value) -> str:
    """`value` as matplotlib draws it as it is: no formula, and no name that a legend leaves out."""
    drawn = printable(value).replace("$", r"\$")
    return " " + drawn if drawn.startswith("_") else drawn


def text(value) -> str:
    """`value` as it may stand in a page."""
    return html.escape(printable(value))


def page(title, body):
    """The page of a title and the HTML `body` under it."""
    return ('<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width"><link rel="icon" href="data:,">'
            '<title>{0}</title><style>{1}</style></head>\n<body><h1>{0}</h1>\n{2}\n</body></html>\n'
            .format(text(title), _STYLE, body))


def table(head, rows):
    """A table of plain values; `head` names the columns."""
    lines = ["<tr>{}</tr>".format("".join("<td>{}</td>".format(text(cell)) for cell in row)) for row in rows]
    return "<table><tr>{}</tr>\n{}</table>".format("".join("<th>{}</th>".format(text(cell))
                                                   for cell in head), "\n".join(lines))


def draw(figure, file_format):
    """A matplotlib figure as the bytes of a "png" or "svg" file."""
    import matplotlib
    content = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "font.family": "sans-serif"}):
        figure.savefig(content, format=file_format, bbox_inches="tight")
    return content.getvalue()


def image(content, kind, description):
    """An image, given by the bytes of its file, inside the page; kind: "png" or "svg+xml"."""
    return '<img alt="{}" src="data:image/{};base64,{}">'.format(text(description), kind,
        base64.b64encode(content).decode())
