"""What an agent hears: C only, see hearing.pxd. It has nothing for Python."""
