"""tbd"""
def play(run, judge):
    raise NotImplementedError
