"""Datasets as people keep them, turned into rows: which file it is, which columns it has, and what the model will see of it.

``files`` tells kinds of files apart and unpacks them, ``tables`` reads them as records, ``columns`` finds out what the columns mean,
``conversations`` takes chats apart,
``examples`` makes a row of every record, ``sources`` finds the splits, and ``folders`` finds the datasets in a folder.
"""
