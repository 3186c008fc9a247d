"""The look of report.html."""

CSS = """
:root{--ink:#1d2125;--soft:#5f6368;--line:#e3e6ea;--back:#f6f7f9;--blue:#0072b2;--red:#b04a00}
*{box-sizing:border-box}
body{margin:0;background:var(--back);color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
header,main{max-width:1080px;margin:0 auto;padding:0 20px}
header{padding-top:40px}
h1{font-size:clamp(1.6rem,5vw,2.3rem);line-height:1.15;margin:0 0 .4em;overflow-wrap:anywhere}
h2{font-size:1.25rem;margin:0 0 .7em}
.kicker{margin:0;color:var(--blue);font-weight:600;font-size:.85rem;letter-spacing:.04em;text-transform:uppercase}
.lead{color:var(--soft);max-width:46em;margin:.2em 0 1.4em}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(210px,45%),1fr));gap:12px}
.tile{background:#fff;border:1px solid var(--line);border-radius:10px;padding:14px 16px}
.tile span{display:block;color:var(--soft);font-size:.85rem}
.tile b{font-size:2rem;line-height:1.25;font-weight:650}
.tile small{font-size:1rem;font-weight:400;color:var(--soft)}
.tile em{display:block;font-style:normal;font-size:.85rem}
.up{color:var(--blue)}.down{color:var(--red)}
section{background:#fff;border:1px solid var(--line);border-radius:10px;padding:20px 24px;margin:18px 0}
.scroll{overflow-x:auto;-webkit-overflow-scrolling:touch}
.tall{max-height:30rem;overflow-y:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;width:100%}
th,td{padding:9px 12px;text-align:right;white-space:nowrap;border-bottom:1px solid var(--line)}
thead th{color:var(--soft);font-weight:600;vertical-align:bottom;font-size:.92rem}
thead small{display:block;font-weight:400;font-size:.78rem}
table.main th:first-child{text-align:left;font-weight:500}
td small{color:var(--soft)}
tr.chosen th,tr.chosen td{background:#eef6fb;font-weight:650}
tr.chosen small{font-weight:400}
.note,figcaption{color:var(--soft);font-size:.9rem}
figure{margin:0}
figure img{display:block;width:100%;min-width:760px;height:auto}
figcaption{margin-top:10px;max-width:60em}
dl{display:grid;grid-template-columns:minmax(8em,max-content) 1fr;gap:6px 20px;margin:0}
dt{color:var(--soft)}dd{margin:0;overflow-wrap:anywhere}
details{margin-top:8px}summary{cursor:pointer;color:var(--blue)}
details table{font-size:.88rem}details th,details td{padding:4px 10px}
pre{overflow-x:auto;background:var(--back);padding:12px;border-radius:8px;font-size:.85rem}
code{font-size:.9em}
@media(max-width:600px){
table.main th:first-child{white-space:normal;min-width:8.5em;position:sticky;left:0;background:#fff}
table.main tr.chosen th:first-child{background:#eef6fb}
th,td{padding:8px}
header,main{padding-left:12px;padding-right:12px}
section{padding:16px 14px}
dl{grid-template-columns:1fr;gap:0}
dd{margin-bottom:8px}
.tile b{font-size:1.6rem}
}
@media print{body{background:#fff}section{break-inside:avoid;border:0}.tall{max-height:none}}
"""
