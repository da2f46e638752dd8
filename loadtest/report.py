"""tbd"""
import json
def write_report(out, scenario, command, began, run, judge, doubts):
    return json.dumps(run.record.total.as_json(run.titles)["closes"])
