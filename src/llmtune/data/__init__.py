"""From the files of a config to the tokens of every training step, and to an account of every row.

The way of a row, in the order of the folders; each imports only from those before it:

    reading     files, folders, globs, data sets -> records -> `Row` (or `BadRow`, with its file, line and reason)
    rows        a `Row` of any format -> `Conversation`: messages, or a plain text
    rendering   a `Conversation` -> ids and weights: one weight for each token, 0 where it is not trained
    dataset     all rows -> cut, tokenized and cached, compared, held out -> `ExampleSet` -> packs -> windows of steps

How the mask is made, for any chat template and without changing it (`rendering/`):

1. The template is rendered with strings that carry the *origin* of each character (`provenance`): the template itself,
   or the message a character came from. Operations of the template such as trimming and joining keep origins.
2. The text is tokenized so that content cannot become a control token, whatever it spells (`encoding`).
3. An answer is trained from the end of the prompt that a model would see there, which is the template's rendering of
   the earlier messages with its generation prompt, through the control tokens that end the turn (`spans`).
4. Where a template gives no clear answer, the message is not trained and a warning gives the reason.

Every row ends with exactly one status (`dataset/ledger.py`), and the sum of all statuses is the number of rows read.
"""
